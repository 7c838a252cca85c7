"use strict";
// A conversation with both models. Answers arrive piece by piece and go into the page as text.

const form = document.querySelector("#chat");
const log = document.querySelector("#turns");
const state = document.querySelector("#chat-status");
const names = { tuned: "fine-tuned", base: "base" };
let turns = [];
let stopped = null;

const field = (name) => document.getElementById(name);

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

function showTurn(text) {
  const turn = element("article", "turn");
  turn.append(element("p", "question", text));
  const answers = element("div", "answers");
  const places = {};
  for (const side of Object.keys(names)) {
    const answer = element("div", `answer ${side}`);
    places[side] = element("p", "text");
    answer.append(element("p", "who", names[side]), places[side]);
    answers.append(answer);
  }
  turn.append(answers);
  log.append(turn);
  turn.scrollIntoView({ block: "end" });
  return places;
}

async function ask(side, text, place) {
  const request = {
    side, text, turns, system: field("system").value,
    temperature: Number(field("temperature").value), max_new_tokens: Number(field("max_new_tokens").value),
  };
  const response = await fetch("/run/answer", {
    method: "POST", signal: stopped.signal, headers: { accept: "application/json" },
    body: new URLSearchParams({ path: form.dataset.path, request: JSON.stringify(request) }),
  });
  if (!response.ok) throw new Error((await response.json()).problem);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let whole = null;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const news = JSON.parse(line);
      if (news.error) throw new Error(news.error);
      if ("piece" in news) place.textContent += news.piece;
      if ("result" in news) whole = news.result;
    }
  }
  if (whole === null) throw new Error("the answer was cut off");
  place.textContent = whole;
  if (!whole) place.append(element("span", "note", "(nothing)"));
  return whole;
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = field("message").value.trim();
  if (!text || stopped) return;
  stopped = new AbortController();
  field("message").value = "";
  field("stop").hidden = false;
  form.querySelector("[type=submit]").disabled = true;
  state.className = "";
  const places = showTurn(text);
  const answers = {};
  try {
    for (const side of Object.keys(names)) {
      state.textContent = `The ${names[side]} model is answering …`;
      answers[side] = await ask(side, text, places[side]);
    }
    if (answers.tuned && answers.base) turns.push({ user: text, answers });
    state.textContent = answers.tuned && answers.base ? "" : "An answer is empty; this exchange is not kept for the next.";
  } catch (error) {
    state.className = error.name === "AbortError" ? "" : "error";
    state.textContent = error.name === "AbortError" ? "Stopped; this exchange is not kept for the next." : error.message;
  }
  stopped = null;
  field("stop").hidden = true;
  form.querySelector("[type=submit]").disabled = false;
  field("message").focus();
});
field("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});
field("stop").addEventListener("click", () => stopped && stopped.abort());
field("reset").addEventListener("click", () => {
  if (stopped) stopped.abort();
  turns = [];
  log.replaceChildren();
  state.textContent = "";
  field("message").focus();
});
