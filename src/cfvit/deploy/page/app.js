// The page of `cfvit serve`: sends a photo to the server, and shows what both stages made of it.

const $ = (id) => document.getElementById(id);
const milliseconds = (time) => (time === null ? "–" : `${time < 10 ? time.toFixed(1) : Math.round(time)} ms`);
const giga = (macs) => macs.toFixed(2);

let key = ""; // of the server, where it asks for one
let told = null; // what was said of the last photo
let chosen = null; // eta, once it has been moved
let loaded = null; // the promise of what answers in this browser
let local = null; // the same, while that is wanted
let served = null; // what the server last said of itself
let pending = new AbortController();

/** Asks the server. What it refuses becomes an error with its one line. */
async function ask(address, given = {}) {
  const response = await fetch(address, { ...given, headers: key ? { Authorization: `Bearer ${key}` } : {} });
  if (response.ok) return response;
  $("access").hidden = response.status !== 401;
  const { error } = await response.json().catch(() => ({}));
  throw new Error(error ?? `The server answers with status ${response.status}.`);
}

function fail(message) {
  $("failure").textContent = message;
  $("failure").hidden = !message;
}

/** What both stages make of a photo, and the photo as the model sees it. */
async function explainedByServer(photo, signal) {
  const explained = await (await ask("explain", { method: "POST", body: photo, signal })).json();
  const view = new Image();
  view.src = `data:image/png;base64,${explained.view}`;
  await view.decode();
  return [explained, view];
}

/** Shows what becomes of a photo: a file, or the promise of one. */
async function look(photo, sample = null) {
  pending.abort(); // the last photo chosen is the one that counts
  const mine = (pending = new AbortController());
  for (const button of document.querySelectorAll("[data-sample]")) button.ariaPressed = String(button === sample);
  fail("");
  $("answer").ariaBusy = "true";
  try {
    const [explained, view] = await (local ? (await local)(await photo, served.eta) : explainedByServer(await photo, mine.signal));
    if (mine.signal.aborted) return;
    told = explained;
    $("answer").hidden = false;
    drawViews(view);
    showAnswers();
    decide();
  } catch (error) {
    if (mine.signal.aborted) return;
    $("answer").hidden = true;
    fail(error instanceof TypeError && !local ? "No answer: the server has gone, or the file is too large for it." : error.message);
  } finally {
    if (mine === pending) $("answer").ariaBusy = "false";
  }
}

/** The three pictures: what the coarse stage reads, where it looked, what the fine stage reads. */
function drawViews(view) {
  const [rows, columns] = told.grid;
  const zoom = Math.ceil(640 / view.width);
  const [width, height] = [zoom * view.width, zoom * view.height];
  const [wide, high] = [width / columns, height / rows];
  const cells = told.split.map((split, i) => ({ split, x: (i % columns) * wide, y: Math.floor(i / columns) * high }));

  const half = document.createElement("canvas"); // all that the coarse stage sees
  [half.width, half.height] = [view.width / 2, view.height / 2];
  half.getContext("2d").drawImage(view, 0, 0, half.width, half.height);

  const [glance, attention, split] = ["glance", "attention", "split"].map((id) => {
    [$(id).width, $(id).height] = [width, height];
    const pen = $(id).getContext("2d");
    pen.imageSmoothingEnabled = false; // pixels are shown as they are
    pen.lineWidth = zoom / 2;
    return pen;
  });
  const outline = (pen, { x, y }, colour) => {
    pen.strokeStyle = colour;
    pen.strokeRect(x, y, wide, high);
  };

  glance.drawImage(half, 0, 0, width, height);
  for (const cell of cells) outline(glance, cell, "#fff6");

  const [least, most] = [Math.min(...told.class_attention), Math.max(...told.class_attention)];
  attention.filter = "grayscale(1)";
  attention.drawImage(view, 0, 0, width, height);
  attention.filter = "none";
  cells.forEach(({ x, y }, i) => {
    attention.fillStyle = heat((told.class_attention[i] - least) / (most - least || 1));
    attention.fillRect(Math.round(x), Math.round(y), Math.round(x + wide) - Math.round(x), Math.round(y + high) - Math.round(y));
  });

  const veil = getComputedStyle(document.body).backgroundColor;
  split.drawImage(half, 0, 0, width, height);
  split.fillStyle = veil;
  split.globalAlpha = 0.6;
  split.fillRect(0, 0, width, height);
  split.globalAlpha = 1;
  for (const cell of cells.filter((cell) => cell.split)) {
    const { x, y } = cell;
    split.drawImage(view, x / zoom, y / zoom, wide / zoom, high / zoom, x, y, wide, high);
    outline(split, cell, "#fff9");
    for (const [dx, dy] of [[wide / 2, 0], [0, high / 2]]) {
      split.strokeStyle = "#fff6";
      split.strokeRect(x + dx, y + dy, dx ? 0 : wide, dy ? 0 : high);
    }
  }

  const where = told.class_attention.indexOf(most);
  const count = told.split.filter(Boolean).length;
  $("glance").ariaLabel = `The photo at ${half.width} by ${half.height} pixels, in ${rows} by ${columns} patches`;
  $("attention").ariaLabel = `Most attention in row ${Math.floor(where / columns) + 1}, column ${(where % columns) + 1}`;
  $("split").ariaLabel = `The photo with ${count} of ${rows * columns} cells split into four, the others faded`;
  $("coarse-note").textContent = `The photo at half its size, in ${rows} × ${columns} patches.`;
  $("fine-note").textContent = `${count} of ${rows * columns} cells, split into four. The others stay as they were.`;
}

/** A colour from black over red to yellow, for a share of 1. */
function heat(share) {
  const stops = [[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]];
  const place = Math.min(share * 4, 3.999);
  const [from, to] = [stops[Math.floor(place)], stops[Math.floor(place) + 1]];
  const mixed = from.map((value, i) => Math.round(value + (to[i] - value) * (place % 1)));
  return `rgb(${mixed.join(" ")} / 0.72)`;
}

function showAnswers() {
  for (const stage of ["coarse", "fine"]) {
    const rows = told[stage].map(({ label, probability }) => {
      const [row, name, value, bar] = ["li", "span", "span", "i"].map((tag) => document.createElement(tag));
      name.textContent = name.title = label;
      value.textContent = `${(100 * probability).toFixed(1)}%`;
      bar.style.width = `${100 * probability}%`;
      row.append(name, value, bar);
      return row;
    });
    $(`${stage}-guesses`).replaceChildren(...rows);
  }
  $("coarse-spent").textContent = `${milliseconds(told.milliseconds_coarse)}, ${giga(told.gmacs_coarse)} GMACs`;
}

/** Which stage answers at eta. Both answers are here already, so no request is made. */
function decide() {
  const eta = chosen ?? told.eta;
  const sure = told.coarse_confidence;
  const stage = eta >= 1 || (eta > 0 && !(sure >= eta)) ? 1 : 0; // as cfvit.modeling.exit.goes_on
  const [name, best] = stage ? ["fine", told.fine[0]] : ["coarse", told.coarse[0]];
  $("answer").className = `stage-${stage}`;

  const [at, confidence] = [eta.toFixed(3), sure.toFixed(3)];
  $("eta").value = eta;
  $("eta-value").textContent = at;
  $("answer").style.setProperty("--confidence", Math.min(Math.max(sure, 0), 1));
  const mark = document.createElement("span");
  mark.textContent = `the glance: ${confidence}`;
  $("sure").replaceChildren(mark);
  $("reason").textContent =
    eta >= 1 ? "At 1 every photo is read again."
    : eta <= 0 ? "At 0 the glance always answers."
    : stage ? `The glance is ${confidence} sure, and ${at} is asked for: the photo is read again.`
    : `The glance is ${confidence} sure, and ${at} is asked for: it answers.`;
  $("reset").hidden = chosen === null;
  $("reset").textContent = `Back to the server's ${told.eta.toFixed(3)}`;

  const [spent, plain] = [stage ? told.gmacs_both : told.gmacs_coarse, told.gmacs_plain];
  const share = Math.round((100 * spent) / plain);
  const saved = share > 100 ? `${share - 100}% more than the plain network` : `${100 - share}% saved`;
  const answers = document.createElement("em");
  answers.textContent = `the ${name} stage answers`;
  $("label").textContent = best.label;
  $("summary").replaceChildren(answers, `, ${(100 * best.probability).toFixed(0)}% probable, ${saved}`);
  $("cost").textContent = `${giga(spent)} GMACs, ${share}% of the ${giga(plain)} that the plain network always takes`;
  const more = `${milliseconds(told.milliseconds_fine)} and ${giga(told.gmacs_both - told.gmacs_coarse)} GMACs more`;
  $("fine-spent").textContent = stage ? more : `${more}, not needed at this eta`;
  const whole = Math.max(plain, told.gmacs_both);
  const [coarse, fine, end] = $("bar").children;
  coarse.style.width = `${(100 * told.gmacs_coarse) / whole}%`;
  fine.style.width = `${(100 * (spent - told.gmacs_coarse)) / whole}%`;
  end.hidden = whole === plain;
  end.style.left = `${(100 * plain) / whole}%`;
}

/** The server's figures, every two seconds while the page is seen; less often when the server has gone. */
async function watchServer() {
  let pause = 2000;
  if (!document.hidden) {
    try {
      served = await (await ask("stats", { signal: AbortSignal.timeout(5000) })).json();
      const { images, queues } = served;
      const eta = served.eta_now < served.eta ? `${served.eta_now.toFixed(3)} under load` : served.eta.toFixed(3);
      const figures = {
        model: served.model,
        rate: served.requests_per_second.toFixed(1),
        p50: milliseconds(served.p50_ms),
        p95: milliseconds(served.p95_ms),
        answered: `${images.coarse} + ${images.fine}`,
        queues: `${queues.coarse} + ${queues.fine}`,
        "server-eta": eta,
        state: served.ready ? "in the last minute" : "is ending",
      };
      for (const [id, text] of Object.entries(figures)) $(id).textContent = text;
      $("server").className = "";
      $("local-choice").hidden = !served.browser;
    } catch {
      $("server").className = "gone";
      $("state").textContent = "does not answer";
      pause = 10000;
    }
  }
  setTimeout(watchServer, pause);
}

$("file").addEventListener("change", () => {
  if ($("file").files[0]) look($("file").files[0]);
  $("file").value = ""; // the same file may be chosen again
});
for (const button of document.querySelectorAll("[data-sample]")) {
  button.addEventListener("click", () => look(fetch(button.dataset.sample).then((file) => file.blob()), button));
}
for (const event of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(event, (drag) => {
    drag.preventDefault();
    document.body.classList.toggle("dragging", event === "dragover");
    if (event === "drop") take(drag.dataTransfer.files[0]);
  });
}
document.addEventListener("paste", (paste) => {
  if (!paste.target.matches("#key")) take(paste.clipboardData.files[0]);
});
function take(file) {
  if (file) look(file);
  else fail("That was no image file: save the picture first, and drop or choose the file.");
}
$("eta").addEventListener("input", () => {
  chosen = $("eta").valueAsNumber;
  decide();
});
$("reset").addEventListener("click", () => {
  chosen = null;
  decide();
  $("eta").focus();
});
$("local").addEventListener("change", async () => {
  local = $("local").checked ? (loaded ??= import("./browser.js").then(({ load }) => load(ask))) : null;
  $("local-state").textContent = local ? "The model is loading." : "";
  if (!local) return;
  $("local").disabled = true;
  try {
    await local; // photos that are chosen meanwhile wait for it too
    $("local-state").textContent = "No photo leaves this machine. The browser resizes a little differently from the server.";
  } catch (error) {
    local = loaded = null;
    $("local").checked = false;
    $("local-state").textContent = "";
    fail(`The model cannot run in this browser: ${error.message}`);
  }
  $("local").disabled = false;
});
$("access").addEventListener("submit", (submit) => {
  submit.preventDefault();
  key = $("key").value;
  $("access").hidden = true;
  fail("");
});
watchServer();
