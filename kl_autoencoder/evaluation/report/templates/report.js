"use strict";
const choices = JSON.parse(document.getElementById("choices").textContent);
const viewers = [...document.querySelectorAll(".viewer")].map((figure) => viewer(figure));

function show() {
  const chosen = document.querySelector("input[name=choice]:checked").value;
  const error = document.querySelector("input[name=view]:checked").value === "error";
  viewers.forEach((v, i) => v.show(choices[i][chosen], error));
}
document.querySelectorAll(".controls input").forEach((input) => input.addEventListener("change", show));
show();
const chosen = document.querySelector("input[name=choice]:checked").parentElement;
chosen.parentElement.scrollLeft = chosen.offsetLeft;  // where the choices are wider than the screen
