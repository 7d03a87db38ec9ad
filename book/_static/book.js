// Small repairs of the page that style sheets cannot make.

// Boxes that scroll sideways can be reached with the keyboard.
function makeScrollableFocusable() {
  const boxes = ".katex-display, div.cell_output .output, .pst-scrollable-table-container, pre";
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
