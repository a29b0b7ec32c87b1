// The tokens of each arm's latest request, a lane an arm, coloured by the path that made each; a click says which.
// Everything is set as text, never as markup: tokens and names come from outside.

const STYLE = `
.hl-lanes { font-family: var(--jp-code-font-family, monospace); font-size: 13px; line-height: 1.9; }
.hl-lane { display: flex; gap: 12px; margin: 2px 0; }
.hl-arm { flex: 0 0 13em; font-weight: 600; }
.hl-text { white-space: pre-wrap; overflow-wrap: anywhere; }
.hl-token { border: 0; border-bottom: 3px solid; background: none; color: inherit; font: inherit; padding: 1px 0;
            margin-right: 1px; cursor: pointer; white-space: pre-wrap; }
.hl-token:hover, .hl-token[aria-pressed=true] { background: rgba(128, 128, 128, 0.35); }
.hl-key { margin-right: 16px; border-bottom: 3px solid; }`;

function shown(text) {
  return text === "" ? "\u2009" : text.replaceAll("\n", "⏎\n");
}

function element(kind, name, text = "") {
  const made = document.createElement(kind);
  made.className = name;
  made.textContent = text;
  return made;
}

function token(model, lane, [text, path], index) {
  const [arm, request] = model.get("chosen") ?? [];
  const made = element("button", "hl-token", shown(text));
  made.style.borderBottomColor = model.get("colours")[path] ?? "currentColor";
  made.dataset.path = path;
  made.setAttribute("aria-pressed", arm === lane.arm && request === lane.request && model.get("chosen")[2] === index);
  made.title = `token ${index + 1}: ${path}`;
  made.addEventListener("click", () => {
    model.set("chosen", [lane.arm, lane.request, index]);
    model.save_changes();
  });
  return made;
}

function render({ model, el }) {
  const lanes = element("div", "hl-lanes");
  el.append(element("style", "", STYLE), lanes);
  const draw = () => {
    const key = element("div", "hl-lane");
    key.append(element("span", "hl-arm", "path"));
    for (const [path, colour] of Object.entries(model.get("colours"))) {
      const entry = element("span", "hl-key", path);
      entry.style.borderBottomColor = colour;
      key.append(entry);
    }
    lanes.replaceChildren(key, ...model.get("lanes").map((lane) => {
      const row = element("div", "hl-lane"), text = element("span", "hl-text");
      text.append(...lane.tokens.map((each, index) => token(model, lane, each, index)));
      row.append(element("span", "hl-arm", `${lane.arm}, request ${lane.request + 1}`), text);
      return row;
    }));
  };
  model.on("change:lanes", draw);
  model.on("change:chosen", draw);
  draw();
}

export default { render };
