// A comparison: viewers that follow one another, and what the controls above them show.
function compare(root) {
  const form = root.querySelector("form.comparison");
  if (!form || form.dataset.ready) return;
  form.dataset.ready = "yes";
  form.addEventListener("submit", (event) => event.preventDefault());
  const choices = JSON.parse(form.dataset.choices);
  const figures = [...form.querySelectorAll(".viewer")];
  const viewers = figures.map((figure, i) => viewer(figure, (place) =>
    viewers.forEach((other, j) => j !== i && other.follow(place))));
  const gain = form.elements.gain, made = new Map();
  let turn = 0;

  function shown(i) {
    const box = form.querySelector(`input[name=method][value="${i}"]`);
    return !box || box.checked;
  }
  function show() {
    const mine = ++turn;
    const isDifference = form.elements.view.value === "difference";
    gain.parentElement.hidden = !isDifference;
    gain.nextElementSibling.textContent = "×" + gain.value;
    figures.forEach((figure, i) => {
      figure.hidden = !shown(i);
      if (figure.hidden) return;
      if (!isDifference) return viewers[i].show(choices[i]);
      const source = figure.querySelector(".pane img").src;
      difference(source, choices[i].source, Number(gain.value)).then((picture) => {
        if (mine !== turn) return URL.revokeObjectURL(picture);  // something else was chosen meanwhile
        if (made.has(i)) URL.revokeObjectURL(made.get(i));
        made.set(i, picture);
        viewers[i].show({ ...choices[i], source: picture, label: "difference ×" + gain.value });
      });
    });
  }
  form.addEventListener("input", show);
  form.elements.blink.addEventListener("change", () => blink(form));
  show();
}

// Show the whole left and the whole right image in turn, as long as the box is checked and the page has the form.
function blink(form) {
  const on = form.isConnected && form.elements.blink.checked;
  form.classList.toggle("blinking", on);
  form.classList.toggle("left-only", on && !form.classList.contains("left-only"));
  if (on) setTimeout(() => blink(form), 600);
}

// 127.5 + gain (b - a) / 2 of each level, as the address of a picture.
async function difference(a, b, gain) {
  const [left, right] = await Promise.all([a, b].map(levels));
  for (let i = 0; i < left.data.length; i++) {
    if (i % 4 < 3) left.data[i] = Math.round(127.5 + gain * (right.data[i] - left.data[i]) / 2);
  }
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width: left.width, height: left.height });
  canvas.getContext("2d").putImageData(left, 0, 0);
  return URL.createObjectURL(await new Promise((done) => canvas.toBlob(done)));
}

async function levels(source) {
  const image = new Image();
  image.src = source;
  await image.decode();
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width: image.naturalWidth, height: image.naturalHeight });
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height);
}
