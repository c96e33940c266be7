// Answers in this browser, by onnxruntime-web and the two graphs of an exported model. No photo leaves the machine.

/** Loads both graphs and what runs them. `ask` asks the server, as in app.js. */
export async function load(ask) {
  const runtime = await import("./runtime/ort.wasm.min.mjs");
  runtime.env.wasm.numThreads = 1; // more would need a page that is isolated from others
  const about = await (await ask("graphs/cfvit.json")).json();
  const bytes = async (name) => new Uint8Array(await (await ask(name)).arrayBuffer());
  const externalData = [{ path: "weights.data", data: await bytes("graphs/weights.data") }]; // of both graphs
  const open = async (name) => runtime.InferenceSession.create(await bytes(name), { externalData });
  const model = { about, runtime, coarse: await open("graphs/coarse.onnx"), fine: await open("graphs/fine.onnx") };
  return (photo, eta) => explain(model, photo, eta);
}

/** What both stages make of a photo, as the server's /explain tells it, and the photo as the model sees it. */
async function explain(model, photo, eta) {
  const { config, exit, macs, class_names: names } = model.about;
  const view = cropped(model.about, await createImageBitmap(photo));
  const { coarse, fine, milliseconds } = await answer(model, view);
  const grid = [config.coarse_grid].flat();
  const attention = [...coarse.class_attention.data];
  const count = Math.ceil(Number((config.informative_ratio * attention.length).toFixed(6)));
  const ranked = attention.map((_, i) => i).sort((a, b) => attention[b] - attention[a]); // stable: the first of equals
  const guesses = (logits, temperature) => {
    const found = softmax(logits, temperature).map((probability, i) => ({ label: names?.[i] ?? String(i), probability }));
    return found.sort((a, b) => b.probability - a.probability).slice(0, 5);
  };
  const explained = {
    grid: grid.length === 1 ? [grid[0], grid[0]] : grid,
    class_attention: attention,
    split: attention.map((_, i) => ranked.indexOf(i) < count),
    coarse: guesses(coarse.logits.data, exit.coarse_temperature),
    fine: guesses(fine.logits.data, exit.fine_temperature),
    coarse_confidence: coarse.confidence.data[0],
    fine_confidence: fine.confidence.data[0],
    eta,
    gmacs_coarse: macs.coarse / 1e9,
    gmacs_both: (macs.coarse + macs.fine) / 1e9,
    gmacs_plain: macs.backbone / 1e9,
    milliseconds_coarse: milliseconds[0],
    milliseconds_fine: milliseconds[1],
  };
  return [explained, view];
}

/** A photo at the model's size, as timm cuts, squashes or borders it. The browser resizes, a little differently from Pillow. */
export function cropped({ image_size: [height, width], data_config: data }, photo) {
  const scales = [Math.floor(width / data.crop_pct) / photo.width, Math.floor(height / data.crop_pct) / photo.height];
  const fit = { center: Math.max, border: Math.min }[data.crop_mode ?? "center"]; // else squashed
  const up = height === width && fit === Math.max ? 1e-6 : 0.5; // timm rounds all but square centres
  const resized = (side, i) => Math.floor(side * (fit?.(...scales) ?? scales[i]) + up);
  const [wide, high] = [photo.width, photo.height].map(resized);
  const place = [-Math.round((wide - width) / 2), -Math.round((high - height) / 2), wide, high];
  const view = Object.assign(document.createElement("canvas"), { width, height });
  const pen = view.getContext("2d", { willReadFrequently: true });
  pen.imageSmoothingQuality = "high";
  pen.fillStyle = `rgb(${data.mean.map((value) => Math.round(255 * value)).join(" ")})`; // beside it, with a border
  pen.fillRect(0, 0, width, height);
  pen.fillStyle = "white"; // behind what is transparent
  pen.fillRect(...place);
  pen.drawImage(photo, ...place);
  return view;
}

/** All that both graphs give for a canvas of the model's size, and the milliseconds of each. */
export async function answer({ about, runtime, coarse, fine }, view) {
  const { mean, std } = about.data_config;
  const { width, height } = view;
  const { data } = view.getContext("2d").getImageData(0, 0, width, height);
  const pixels = Float32Array.from({ length: 3 * width * height }, (_, i) => {
    const channel = Math.floor(i / (width * height));
    return (data[4 * (i % (width * height)) + channel] / 255 - mean[channel]) / std[channel];
  });
  const images = new runtime.Tensor("float32", pixels, [1, 3, height, width]);
  const start = performance.now();
  const state = await coarse.run({ images });
  const between = performance.now();
  const known = { ...state, coarse_logits: state.logits, images };
  const answers = await fine.run(Object.fromEntries(fine.inputNames.map((name) => [name, known[name]])));
  return { coarse: state, fine: answers, milliseconds: [between - start, performance.now() - between] };
}

function softmax(logits, temperature) {
  const most = Math.max(...logits);
  const powers = [...logits].map((logit) => Math.exp((logit - most) / temperature));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((power) => power / sum);
}
