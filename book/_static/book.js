// Small repairs of the page that style sheets cannot make.

// A formula is set as soon as it is read, before it is painted, so that no text moves afterwards.
function setMathematics() {
  for (const box of document.querySelectorAll(".math:not(:has(.katex))")) {
    const text = box.lastChild;
    const found = text?.data?.trim().match(/^\\([([])(.*)\\[)\]]$/s);
    if (!found) continue; // not yet read to its end
    const formula = document.createElement("span");
    katex.render(found[2], formula, { displayMode: found[1] === "[", throwOnError: false });
    text.replaceWith(...formula.childNodes);
  }
}
const reading = new MutationObserver(setMathematics);
reading.observe(document, { childList: true, characterData: true, subtree: true });
document.addEventListener("DOMContentLoaded", () => {
  reading.disconnect();
  setMathematics();
});

// An excerpt of a page, below a hit of the search, has no use for TeX.
document.addEventListener("DOMContentLoaded", () => {
  if (typeof Search === "undefined") return;
  const { htmlToText } = Search;
  Search.htmlToText = (page, anchor) => {
    const parsed = new DOMParser().parseFromString(page, "text/html");
    parsed.querySelectorAll(".math").forEach((box) => box.replaceWith("…"));
    return htmlToText(parsed.documentElement.outerHTML, anchor);
  };
});

// An animation can be stopped, and stands still from the start for those who ask for no motion.
document.addEventListener("DOMContentLoaded", () => {
  for (const picture of document.querySelectorAll("picture.animation")) {
    const still = picture.querySelector("source");
    const button = Object.assign(document.createElement("button"), { type: "button", className: "pause" });
    let plays = !matchMedia("(prefers-reduced-motion: reduce)").matches;
    const show = () => {
      still.media = plays ? "print" : "all";
      button.textContent = plays ? "Pause" : "Play";
      button.setAttribute("aria-label", `${button.textContent} the animation`);
    };
    button.addEventListener("click", () => ((plays = !plays), show()));
    (picture.closest("a") ?? picture).after(button);
    show();
  }
});

// Boxes that scroll sideways can be reached with the keyboard.
function makeScrollableFocusable() {
  const boxes = "figure, .katex-display, div.cell_output .output, .pst-scrollable-table-container, pre";
  for (const box of document.querySelectorAll(boxes)) {
    if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
  }
}

// Folded code and solutions are open on paper, and as they were afterwards.
let folded = [];
window.addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  folded.forEach((box) => (box.open = true));
});
window.addEventListener("afterprint", () => folded.forEach((box) => (box.open = false)));

window.addEventListener("load", makeScrollableFocusable);
window.addEventListener("resize", makeScrollableFocusable);
