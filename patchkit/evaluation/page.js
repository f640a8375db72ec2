const all = (selector) => [...document.querySelectorAll(selector)];
const wrong = document.getElementById("wrong"), prompt = document.getElementById("prompt");
const pressed = (button) => button.getAttribute("aria-pressed") === "true";
function refresh() {
  const off = all("button[data-variant]").filter((b) => !pressed(b)).map((b) => b.dataset.variant);
  let shown = 0;
  for (const figure of all("figure")) figure.classList.toggle("hidden", off.includes(figure.dataset.variant));
  for (const row of all(".row")) {
    const bad = [...row.querySelectorAll("figure[data-wrong]:not(.hidden)")].length > 0;
    const hide = Boolean(wrong && pressed(wrong) && !bad);
    row.classList.toggle("hidden", hide);
    row.dataset.hide = hide ? "1" : "";
  }
  for (const part of all(".case")) {
    const other = Boolean(prompt && prompt.value && prompt.value !== part.dataset.case);
    const empty = [...part.querySelectorAll(".row")].every((row) => row.dataset.hide);
    part.classList.toggle("hidden", other || empty);
    if (!other && !empty) shown += 1;
  }
  document.getElementById("none").classList.toggle("hidden", shown > 0);
}
for (const button of all(".controls button")) button.addEventListener("click", () => {
  button.setAttribute("aria-pressed", String(!pressed(button)));
  refresh();
});
if (prompt) prompt.addEventListener("change", refresh);
refresh();
