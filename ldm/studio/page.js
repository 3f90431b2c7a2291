// Ctrl+Enter generates from anywhere in the tab; a small preview in the strip sets the slider to its step.
document.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  const button = document.querySelector("#generate-button");
  if (button && button.offsetParent !== null) {
    event.preventDefault();
    document.activeElement?.dispatchEvent(new Event("change", { bubbles: true }));
    setTimeout(() => button.click(), 50);
  }
});
