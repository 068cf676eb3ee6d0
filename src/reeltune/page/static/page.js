"use strict";
// What htmx does not do: live events, clips that play in step, one clip over another, and keys.

const still = matchMedia("(prefers-reduced-motion: reduce)");

// ---- live: server-sent events wake the parts of the page that are of them
function listen() {
  const head = document.querySelector("[data-events]");
  if (!head) return;
  const line = document.getElementById("line");
  if (document.hidden) return;  // a browser has six connections to one server, for all its tabs
  const events = new EventSource(head.dataset.events);
  for (const name of ["drawn", "clips"])
    events.addEventListener(name, () => {
      for (const part of document.querySelectorAll(`[data-on="${name}"]`)) htmx.trigger(part, name);
    });
  events.onopen = () => { if (line) line.textContent = ""; };
  events.onerror = () => { if (line) line.textContent = "The server does not answer; is reeltune serve still running?"; };
  const stop = () => { if (document.hidden) { events.close(); document.removeEventListener("visibilitychange", stop); } };
  document.addEventListener("visibilitychange", stop);
  addEventListener("pagehide", () => events.close());
}
document.addEventListener("visibilitychange", () => { if (!document.hidden) listen(); });

// ---- clips are fetched as they come near: each holds a connection while it is
const near = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries)
    if (isIntersecting && !target.getAttribute("src")) {
      target.src = target.dataset.src;
      near.unobserve(target);
    }
}, { rootMargin: "300px" });
const watch = () => document.querySelectorAll("video[data-src]:not([src])").forEach((clip) => { if (!clip.closest("[data-card]")) near.observe(clip); });
document.addEventListener("htmx:after:swap", watch);
document.addEventListener("DOMContentLoaded", watch);

// ---- clips in step: all that share a player
const scopeOf = (element) => element.closest("section, main");
const clipsOf = (scope) => [...scope.querySelectorAll("video")].filter((clip) => clip.currentSrc && clip.offsetParent);
let playing = null, timer = 0;

function play(button, on) {
  const scope = scopeOf(button), clips = clipsOf(scope);
  if (playing && playing !== button) play(playing, false);
  button.setAttribute("aria-pressed", on);
  button.textContent = on ? "Pause all" : "Play all";
  playing = on ? button : null;
  clearInterval(timer);
  if (on) {
    const [first] = clips;
    for (const clip of clips) {
      if (first) clip.currentTime = first.currentTime;
      clip.play().catch(() => {});
    }
    timer = setInterval(() => keepInStep(scope), 250);
  } else clips.forEach((clip) => clip.pause());
}

function keepInStep(scope) {
  const [first, ...others] = clipsOf(scope);
  if (!first || !first.duration) return;
  for (const clip of others) {
    if (clip.paused) clip.play().catch(() => {});
    const apart = Math.abs(clip.currentTime - first.currentTime);
    if (apart > 0.15 && apart < first.duration - 0.15) clip.currentTime = first.currentTime;
  }
  const seek = scope.querySelector("[data-seek]");
  if (seek) seek.value = 1000 * first.currentTime / first.duration;
}

function seekTo(input) {
  const scope = scopeOf(input), button = scope.querySelector("[data-play]");
  if (playing === button) play(button, false);
  for (const clip of clipsOf(scope))
    if (clip.duration) clip.currentTime = Math.min(input.value / 1000, 0.999) * clip.duration;
}

// ---- one clip over another
function openWiper(details) {
  for (const choice of details.querySelectorAll("[data-side]")) {
    const clip = details.querySelector(`.${choice.dataset.side}`);
    if (clip.getAttribute("src") !== choice.value) clip.src = choice.value;
  }
  const [under, over] = details.querySelectorAll("video");
  if (!under || still.matches) return;
  Promise.all([under.play(), over.play()]).then(() => { over.currentTime = under.currentTime; }).catch(() => {});
}

function wipe(input) {
  const details = input.closest("details");
  details.querySelector(".over").style.clipPath = `inset(0 0 0 ${input.value}%)`;
  details.querySelector(".edge").style.left = `${input.value}%`;
}

// ---- a card of the contact sheet plays while it is pointed at or has the focus
function wake(card, on) {
  for (const clip of card.querySelectorAll("video")) {
    if (on) {
      if (!clip.getAttribute("src")) clip.src = clip.dataset.src;
      clip.play().catch(() => {});
    } else clip.pause();
  }
  card.classList.toggle("awake", on);
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-play]");
  if (button) play(button, button.getAttribute("aria-pressed") !== "true");
});
document.addEventListener("input", (event) => {
  if (event.target.matches("[data-seek]")) seekTo(event.target);
  if (event.target.matches("[data-wipe]")) wipe(event.target);
});
document.addEventListener("change", (event) => {
  if (event.target.matches("[data-side]")) openWiper(event.target.closest("details"));
  if (event.target.matches("[data-submits]")) event.target.form.requestSubmit();
});
document.addEventListener("toggle", (event) => {
  if (event.target.matches?.("details.wiper")) {
    if (event.target.open) openWiper(event.target);
    else event.target.querySelectorAll("video").forEach((clip) => clip.pause());
  }
}, true);
for (const [name, on] of [["pointerenter", true], ["pointerleave", false], ["focusin", true], ["focusout", false]])
  document.addEventListener(name, (event) => {
    const card = event.target.closest?.("[data-card]");
    if (!card || (name.startsWith("pointer") && event.target !== card)) return;
    if (!on && card.matches(name === "focusout" ? ":hover" : ":focus-within")) return;
    if (!(on && still.matches)) wake(card, on);
  }, true);
document.addEventListener("keydown", (event) => {
  if (event.target.closest("input, textarea, select, [contenteditable]") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "p") document.querySelector("[data-play]")?.click();
  if (event.key === "ArrowLeft" && !event.target.closest(".grid")) document.querySelector("a[rel=prev]")?.click();
  if (event.key === "ArrowRight" && !event.target.closest(".grid")) document.querySelector("a[rel=next]")?.click();
});
document.addEventListener("DOMContentLoaded", listen);
