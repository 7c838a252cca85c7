"use strict";
// Uploads, the recipe's form beside its text, and what changes on a page while a command runs. Data goes into the page
// as text, or as a part of a page that the server has escaped.

const one = (selector) => document.querySelector(selector);

async function told(response) {
  if (response.ok) return response;
  const type = response.headers.get("content-type") || "";
  if (!type.startsWith("application/json")) throw new Error(await response.text());
  const { file, line, problem, fix } = await response.json();
  const place = file ? `${file}${line ? `:${line}` : ""}: ` : "";
  throw new Error(`${place}${problem}${fix ? `. Fix: ${fix}` : ""}`);
}

const json = { headers: { accept: "application/json" } };
const post = async (path, values) =>
  (await told(await fetch(path, { ...json, method: "POST", body: new URLSearchParams(values) }))).json();
const part = async (path, values) =>
  (await told(await fetch(`${path}?${new URLSearchParams(values)}`, json))).text();

function say(place, text, bad = false) {
  place.textContent = text;
  place.classList.toggle("error", bad);
}

function dropIn(area) {
  const status = one("#upload-status");
  const send = async (file) => {
    say(status, `Copying ${file.name} …`);
    try {
      const name = new URLSearchParams({ name: file.name });
      const answer = await told(await fetch(`/upload?${name}`, { ...json, method: "PUT", body: file }));
      location.assign(`/new?${new URLSearchParams(await answer.json())}`);
    } catch (error) {
      say(status, error.message, true);
    }
  };
  const over = (on) => (event) => {
    event.preventDefault();
    area.classList.toggle("over", on);
  };
  area.addEventListener("dragover", over(true));
  area.addEventListener("dragleave", over(false));
  area.addEventListener("drop", (event) => {
    over(false)(event);
    if (event.dataTransfer.files.length) send(event.dataTransfer.files[0]);
  });
  one("#file").addEventListener("change", (event) => event.target.files.length && send(event.target.files[0]));
}

function editRecipe(form) {
  const file = form.dataset.file;
  const text = form.elements.text;
  const seen = form.elements.seen;
  const status = one("#recipe-status");
  let first = 1;
  let changes = Promise.resolve();

  const fill = async (place, path, values) => {
    place.setAttribute("aria-busy", "true");
    try {
      place.innerHTML = await part(path, values);
    } catch (error) {
      place.replaceChildren(Object.assign(document.createElement("p"), { className: "warning" }));
      place.firstChild.textContent = error.message;
    }
    place.setAttribute("aria-busy", "false");
  };
  const tokens = async (from) => {
    await fill(one("#tokens"), "/recipe/tokens", { file, start: Math.max(1, from) - 1 });
    const shown = one("#shown");
    if (shown) first = Number(shown.dataset.first);
    one("#row").value = first;
    one("#previous").disabled = first <= 1;
    one("#next").disabled = !shown || Number(shown.dataset.last) >= Number(shown.dataset.total);
  };
  const plan = async () => {
    await fill(one("#plan"), "/recipe/plan", { file });
    await tokens(first);
  };
  const change = async (field) => {
    try {
      const values = { text: text.value, name: field.dataset.field, value: field.value };
      text.value = (await post("/recipe/field", values)).text;
      say(status, `${field.dataset.field} changed; not saved yet`);
    } catch (error) {
      say(status, error.message, true);
    }
  };
  const save = async () => {
    await changes;
    try {
      await write();
      await plan();
    } catch (error) {
      fail(error);
    }
  };
  const write = async () => {
    const saved = await post("/recipe/save", { file, seen: seen.value, text: text.value });
    seen.value = saved.seen;
    for (const field of form.querySelectorAll("[data-field]")) {
      field.value = saved.fields[field.dataset.field] ?? field.value;
    }
    say(status, "Saved");
  };
  const fail = (error) => {
    say(status, error.message, true);
    status.scrollIntoView({ block: "center" });
  };
  for (const field of form.querySelectorAll("[data-field]")) {
    field.addEventListener("change", () => { changes = changes.then(() => change(field)); });
    field.addEventListener("keydown", (event) => { if (event.key === "Enter") { event.preventDefault(); field.blur(); } });
  }
  text.addEventListener("input", () => say(status, "Not saved yet"));
  one("#save").addEventListener("click", save);
  one("#next").addEventListener("click", () => tokens(Number(one("#shown")?.dataset.last ?? 0) + 1));
  one("#previous").addEventListener("click", () => tokens(first - 3));
  one("#row").addEventListener("change", (event) => tokens(Number(event.target.value) || 1));
  one("#row").addEventListener("keydown", (event) => { if (event.key === "Enter") { event.preventDefault(); event.target.blur(); } });
  // What a search is given stands in its command, and Enter presses its button, not the first one of the form.
  const shown = [...form.querySelectorAll("[data-shown]")];
  const show = (field) => {
    const { shown: place, before = "", empty = "", joined } = field.dataset;
    const text = joined === undefined ? field.value.trim() : field.value.replace(/\s/g, "");
    document.getElementById(place).textContent = text ? before + text : empty;
  };
  for (const field of shown) {
    field.addEventListener("input", () => show(field));
    field.addEventListener("keydown", (event) => {
      if (event.key !== "Enter") return;
      event.preventDefault();
      document.getElementById(field.dataset.button).click();
    });
  }
  addEventListener("pageshow", () => shown.forEach(show)); // the browser fills the form again after "back"
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    await changes;
    try {
      await write();
      form.action = event.submitter?.getAttribute("formaction") || "/start";
      form.submit();
    } catch (error) {
      fail(error);
    }
  });
  plan();
}

// What a reader has unfolded stays so, and a table that was scrolled, when the part is replaced.
function showLive(place, text) {
  const open = [...place.querySelectorAll("details")].map((fold) => fold.open);
  const scrolled = [...place.querySelectorAll(".scroll")].map((table) => table.scrollLeft);
  const focused = [...place.querySelectorAll(".scroll, summary, a")].indexOf(document.activeElement);
  place.innerHTML = text;
  place.querySelectorAll("details").forEach((fold, number) => { fold.open = open[number] ?? fold.open; });
  place.querySelectorAll(".scroll").forEach((table, number) => { table.scrollLeft = scrolled[number] ?? 0; });
  if (focused >= 0) place.querySelectorAll(".scroll, summary, a")[focused]?.focus({ preventScroll: true });
}

function follow(run) {
  const source = new EventSource(`${run.dataset.events}?${new URLSearchParams({ path: run.dataset.path, state: run.dataset.state })}`);
  source.onmessage = (event) => {
    const news = JSON.parse(event.data);
    if (news.state !== run.dataset.state) {
      source.close();
      location.reload();
      return;
    }
    if (news.live) showLive(one("#live"), news.live);
    const log = one("#log");
    const atEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 8;
    if (log.textContent !== news.log) log.textContent = news.log;
    if (atEnd) log.scrollTop = log.scrollHeight;
  };
}

for (const button of document.querySelectorAll(".pick")) {
  button.addEventListener("click", () => { document.getElementById(button.dataset.for).value = button.dataset.value; });
}
if (one("#drop")) dropIn(one("#drop"));
if (one("form#recipe")) editRecipe(one("form#recipe"));
if (one("#run")) follow(one("#run"));
if (one("#job")) setTimeout(() => location.reload(), 2000);
if (one("#log")) one("#log").scrollTop = one("#log").scrollHeight;
