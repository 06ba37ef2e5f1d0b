// Two things move: which curves are shown, and which step's samples.
for (const box of document.querySelectorAll(".legend input"))
  box.addEventListener("change", () =>
    document.querySelector(`.curve[data-recipe="${box.value}"]`).classList.toggle("hidden", !box.checked));
const slider = document.querySelector("#step");
if (slider) {
  const samples = [...document.querySelectorAll(".samples article")];
  const show = () => {
    const steps = JSON.parse(slider.dataset.steps);
    const step = steps[slider.value];
    document.querySelector("#step-shown").textContent = step.toLocaleString("en");
    for (const article of samples) {
      const texts = JSON.parse(article.dataset.texts);
      const seen = texts.filter(([at]) => at <= step);
      article.querySelector("pre").textContent = seen.length ? seen[seen.length - 1][1] : "–";
    }
  };
  slider.addEventListener("input", show);
  show();
}
