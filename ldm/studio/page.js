// Ctrl+Enter generates from anywhere in the tab.
document.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  const button = document.querySelector("#generate-button");
  if (button && button.offsetParent !== null) {
    event.preventDefault();
    document.activeElement?.dispatchEvent(new Event("change", { bubbles: true }));
    setTimeout(() => button.click(), 50);
  }
});
// A click on a small preview sets the slider to its place.
document.addEventListener("click", (event) => {
  const small = event.target.closest?.(".strip img");
  const slider = document.querySelector("#preview input[type=range]");
  if (!small || !slider) return;
  slider.value = small.dataset.number;
  slider.dispatchEvent(new Event("input", { bubbles: true }));
  slider.dispatchEvent(new PointerEvent("pointerup", { bubbles: true }));
});
