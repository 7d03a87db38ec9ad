"""Count the words that a text cell asks its reader to read.

A word is a run of letters; code, directives' names and options, citations and displayed mathematics
are no words, and a piece of inline mathematics is one.
"""

import re

FENCE = re.compile(r"^(`{3,}|:{3,}|~{3,})\s*(\{(?P<directive>[\w:-]+)\})?(?P<info>.*)$")
NO_PROSE = {"code-block", "code-cell", "math", "bibliography", "figure", "image", "include"}


def prose_lines(markdown: str):
    """The lines outside code, directive heads and directive options."""
    open_fences = []  # (fence, whether its content is prose)
    for line in markdown.splitlines():
        fence = FENCE.match(line)
        if fence and open_fences and fence[1] == open_fences[-1][0] and not line[len(fence[1]) :]:
            open_fences.pop()
        elif fence:
            directive = fence["directive"]
            open_fences.append((fence[1], directive is not None and directive not in NO_PROSE))
        elif all(is_prose for _, is_prose in open_fences) and not re.match(r":\w+:", line):
            yield line


def num_words(markdown: str) -> int:
    text = "\n".join(prose_lines(markdown))
    text = re.sub(r"\$\$.*?\$\$(\s*\([\w:-]+\))?", " ", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->|\{[\w:-]+\}`[^`]*`|\]\([^)]*\)", " ", text, flags=re.DOTALL)
    text = re.sub(r"\$[^$]+\$|`[^`]+`", " symbol ", text)
    return len(re.findall(r"[^\W\d_]+(?:['’-][^\W\d_]+)*", text))
