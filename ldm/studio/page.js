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
// What the buttons do, for whoever rests on one.
const HELP = {
  check: "trains a few steps in a folder of its own: is all well, how fast, how much memory",
  start: "starts the run, as a process of its own: it goes on when this page is closed",
  merge: "the settings as the run will read them, for changing any of them",
  discard: "back to the fields of this page",
  stop: "saves after this step and ends; Continue goes on from there",
  "train-stop": "saves after this step and ends; Continue goes on from there",
  continue: "goes on where the run ended",
  "train-continue": "goes on where the run ended",
  keep: "saves what was learned up to the shown preview as a file in embeddings/",
  earlier: "the queued run comes earlier",
  later: "the queued run comes later",
  remove: "the queued run is taken off the queue",
  plot: "an image for each pair of values, on one sheet",
  "generate-button": "Ctrl+Enter",
  "gen-stop": "stops the images that are being made",
  convert: "writes the word in the format of a tool, for download",
};
document.addEventListener("mouseover", (event) => {
  const button = event.target.closest?.("button");
  if (button?.id in HELP) button.title = HELP[button.id];
});
