// Two images in a figure: `split` is the divider's place from 0 to 1; both are scaled by `zoom` and moved by (x, y)
// pixels. `moved` is called with {split, zoom, x, y}, x and y in widths and heights of the stage, when somebody moves
// something; `follow` of another viewer takes that.
function viewer(figure, moved = () => {}) {
  const stage = figure.querySelector(".stage"), divider = figure.querySelector(".divider");
  const under = figure.querySelector(".under"), over = figure.querySelector(".over");
  const tag = figure.querySelector(".tag-right"), values = figure.querySelector(".values");
  const pointers = new Map();
  let split = 0.5, zoom = 1, x = 0, y = 0, dragging = null;
  under.src = figure.querySelector(".pane img").src;

  function clamp(value, low, high) { return Math.min(Math.max(value, low), high); }

  function draw() {
    const { clientWidth: w, clientHeight: h } = stage;
    x = clamp(x, w - w * zoom, 0);
    y = clamp(y, h - h * zoom, 0);
    stage.style.setProperty("--split", 100 * split + "%");
    stage.style.setProperty("--zoom", zoom);
    stage.style.setProperty("--x", x + "px");
    stage.style.setProperty("--y", y + "px");
    stage.classList.toggle("zoomed", zoom > 1);
    stage.classList.toggle("crisp", zoom * w > 2 * over.naturalWidth);
    divider.setAttribute("aria-valuenow", Math.round(100 * split));
    divider.setAttribute("aria-valuetext", Math.round(100 * split) + " % original");
    figure.querySelector("output").textContent = (zoom < 10 ? zoom.toFixed(1).replace(".0", "") : Math.round(zoom)) + "×";
  }
  function change() {
    draw();
    moved({ split, zoom, x: x / stage.clientWidth, y: y / stage.clientHeight });
  }
  function zoomTo(wanted, px, py) {  // what is under (px, py) stays there
    const next = clamp(wanted, 1, 32);
    x = px - (px - x) * next / zoom;
    y = py - (py - y) * next / zoom;
    zoom = next;
    change();
  }
  function zoomAtCentre(factor) { zoomTo(zoom * factor, stage.clientWidth / 2, stage.clientHeight / 2); }
  function place(event) {
    const box = stage.getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  }

  stage.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    pointers.set(event.pointerId, place(event));
    const onDivider = divider.contains(event.target);
    dragging = pointers.size === 2 ? "pinch" : onDivider || zoom === 1 ? "divider" : "pan";
    if (onDivider) divider.focus({ focusVisible: false });
    stage.setPointerCapture(event.pointerId);
    if (dragging === "divider" && event.pointerType === "mouse") move(event);
    if (event.pointerType === "mouse") event.preventDefault();
  });
  function move(event) {
    if (!pointers.has(event.pointerId)) return;
    const before = new Map(pointers), now = place(event), last = before.get(event.pointerId);
    pointers.set(event.pointerId, now);
    if (dragging === "divider") {
      split = clamp(now.x / stage.clientWidth, 0, 1);
    } else if (dragging === "pan") {
      x += now.x - last.x;
      y += now.y - last.y;
    } else if (pointers.size === 2) {
      const [a, b] = [...before.values()], [c, d] = [...pointers.values()];
      const factor = Math.hypot(c.x - d.x, c.y - d.y) / Math.max(Math.hypot(a.x - b.x, a.y - b.y), 1);
      x += (c.x + d.x - a.x - b.x) / 2;
      y += (c.y + d.y - a.y - b.y) / 2;
      return zoomTo(zoom * factor, (c.x + d.x) / 2, (c.y + d.y) / 2);
    }
    change();
  }
  function end(event) {
    pointers.delete(event.pointerId);
    dragging = null;
  }
  stage.addEventListener("pointermove", move);
  stage.addEventListener("pointerup", end);
  stage.addEventListener("pointercancel", end);
  stage.addEventListener("dblclick", (event) => {
    const { x: px, y: py } = place(event);
    zoomTo(zoom > 1 ? 1 : 4, px, py);
  });
  stage.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return;  // the page scrolls
    event.preventDefault();
    const { x: px, y: py } = place(event);
    zoomTo(zoom * Math.exp(-event.deltaY / 200), px, py);
  }, { passive: false });

  divider.addEventListener("keydown", (event) => {
    const step = event.key.startsWith("Page") ? 0.1 : 0.02;
    const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (by && event.shiftKey && zoom > 1) {
      x -= 40 * by[0];
      y -= 40 * by[1];
    } else if (["ArrowRight", "ArrowUp", "PageUp"].includes(event.key)) split = clamp(split + step, 0, 1);
    else if (["ArrowLeft", "ArrowDown", "PageDown"].includes(event.key)) split = clamp(split - step, 0, 1);
    else if (event.key === "Home") split = 0;
    else if (event.key === "End") split = 1;
    else if (event.key === "+" || event.key === "=") zoomAtCentre(2);
    else if (event.key === "-") zoomAtCentre(0.5);
    else if (event.key === "0") zoom = 1;
    else return;
    event.preventDefault();
    change();
  });
  figure.querySelectorAll("[data-zoom]").forEach((button) =>
    button.addEventListener("click", () => zoomAtCentre(2 ** Number(button.dataset.zoom))));
  new ResizeObserver(draw).observe(stage);

  return {
    follow(place) {
      ({ split, zoom } = place);
      x = place.x * stage.clientWidth;
      y = place.y * stage.clientHeight;
      draw();
    },
    show(choice, error = false) {  // choice: source, label and values of the right image
      over.src = choice.source;
      over.alt = choice.label;
      tag.textContent = error ? "error ×4" : choice.label;
      values.textContent = choice.values.join("  ");
      stage.classList.toggle("error", error);
      draw();
    },
  };
}
