"use strict";

const MOST_VIDEOS = 48; // at once: a browser plays about 75
const MOST_IN_A_CELL = 4;
const LARGEST = 300; // pixels, the height of a video
const NONE = -1;

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children); // texts become text nodes, never markup
  return made;
}

/* Tables that are sorted by their headers. */

function makeSortable(table) {
  const headers = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  headers.forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => {
      const down = header.getAttribute("aria-sort") === "ascending";
      for (const each of headers) each.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
      const rows = [...body.rows].map((row) => [key(row), row]);
      const filled = rows.filter(([text]) => text !== "");
      const numbers = filled.every(([text]) => !Number.isNaN(Number(text)));
      const compare = ([a], [b]) => (numbers ? Number(a) - Number(b) : a.localeCompare(b));
      filled.sort((a, b) => (down ? compare(b, a) : compare(a, b)));
      body.append(...[...filled, ...rows.filter(([text]) => text === "")].map(([, row]) => row));
    });
  });
}

/* One control for all videos. Those that are ahead of the slowest wait for it, so all stay within a frame. */

class Player {
  constructor(bar, frame) {
    this.frame = frame;
    this.videos = [];
    this.playing = false;
    this.position = 0;
    for (const name of ["play", "back", "forward", "time", "clock", "speed", "repeat"]) this[name + "Control"] = bar.querySelector("." + name);
    this.playControl.addEventListener("click", () => (this.playing ? this.pause() : this.play()));
    this.backControl.addEventListener("click", () => this.step(-1));
    this.forwardControl.addEventListener("click", () => this.step(1));
    this.timeControl.addEventListener("input", () => this.seek(Number(this.timeControl.value)));
    this.timeControl.addEventListener("keydown", (event) => {
      const frames = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1 }[event.key];
      if (frames) {
        event.preventDefault();
        this.step(frames);
      }
    });
  }

  /* The videos that can be played, of those that are shown. */
  get ready() {
    return this.videos.filter((video) => !video.error && video.duration > 0);
  }

  get length() {
    return Math.max(0, ...this.ready.map((video) => video.duration));
  }

  show(videos) {
    const playing = this.playing;
    this.pause();
    this.videos = videos;
    const begun = videos.map((video) => new Promise((done) => {
      if (video.readyState >= 1 || video.error) done();
      else for (const type of ["loadedmetadata", "error"]) video.addEventListener(type, done, { once: true });
    }));
    Promise.all(begun).then(() => {
      if (this.videos !== videos) return;
      this.seek(Math.min(this.position, this.length));
      if (playing) this.play();
    });
  }

  async play() {
    if (!this.length) return;
    this.playing = true;
    this.playControl.textContent = "Pause";
    await this.start(this.position < this.length - this.frame / 2 ? this.position : 0);
    if (this.playing) requestAnimationFrame(() => this.tick());
  }

  /* Go to a time, wait until all are there, and begin. */
  async start(position) {
    this.seek(position);
    await Promise.all(this.ready.map(async (video) => {
      for (let i = 0; i < 200 && (video.seeking || video.readyState < 3) && !video.error; i++) await new Promise((done) => setTimeout(done, 20));
    }));
    if (!this.playing) return;
    for (const video of this.ready) {
      video.playbackRate = Number(this.speedControl.value);
      // A video that has ended would begin again.
      if (video.currentTime < video.duration - this.frame / 4) video.play().catch(() => {});
    }
  }

  pause() {
    const before = this.playing;
    this.playing = false;
    this.playControl.textContent = "Play";
    for (const video of this.videos) video.pause();
    if (before) this.seek(this.position);
  }

  seek(position) {
    this.position = Math.max(0, Math.min(position, this.length));
    for (const video of this.ready) {
      video.currentTime = Math.min(this.position, video.duration);
      if (this.playing && video.paused && video.currentTime < video.duration - this.frame / 4) video.play().catch(() => {});
    }
    this.draw();
  }

  /* A time in the middle of a frame shows that frame, whichever way the browser rounds. */
  step(frames) {
    this.pause();
    const last = Math.max(0, Math.round(this.length / this.frame) - 1);
    const number = Math.floor(this.position / this.frame + 1e-3) + frames;
    this.seek((Math.max(0, Math.min(number, last)) + 0.5) * this.frame);
  }

  tick() {
    if (!this.playing) return;
    const running = this.ready.filter((video) => !video.ended && !video.paused);
    if (running.length) {
      const speed = Number(this.speedControl.value);
      const slowest = Math.min(...running.map((video) => video.currentTime));
      for (const video of running) {
        const lead = (video.currentTime - slowest) / this.frame;
        const rate = lead < 0.1 ? speed : lead < 0.5 ? speed / 2 : 0;
        if (video.playbackRate !== rate) video.playbackRate = rate;
      }
      this.position = slowest;
      this.draw();
      requestAnimationFrame(() => this.tick());
    } else if (this.repeatControl.checked && this.length) {
      this.start(0).then(() => this.playing && requestAnimationFrame(() => this.tick()));
    } else {
      this.position = this.length;
      this.pause();
    }
  }

  draw() {
    this.timeControl.max = this.length;
    this.timeControl.value = this.position;
    const text = `${this.position.toFixed(2)} of ${this.length.toFixed(2)} s`;
    this.timeControl.setAttribute("aria-valuetext", text);
    this.clockControl.textContent = text;
  }
}

/* The record of a job: shown while the caption has the pointer or the focus, kept open by a click. */

function makePanel(card) {
  const caption = card.querySelector("figcaption");
  const button = caption.querySelector("button.record");
  const panel = caption.querySelector(".panel");
  let pinned = false;
  let timer = 0;
  const place = () => {
    const at = button.getBoundingClientRect();
    const size = panel.getBoundingClientRect();
    panel.style.left = `${Math.max(8, Math.min(at.left, innerWidth - size.width - 8))}px`;
    panel.style.top = `${at.bottom + size.height > innerHeight && at.top > size.height ? at.top - size.height : at.bottom}px`;
  };
  const follow = (event) => event.target !== panel && place();
  const set = (open) => {
    clearTimeout(timer);
    if (open === panel.matches(":popover-open")) return;
    button.setAttribute("aria-expanded", open);
    if (open) {
      panel.showPopover();
      place();
    } else {
      pinned = false;
      panel.hidePopover();
    }
    document[open ? "addEventListener" : "removeEventListener"]("scroll", follow, true);
  };
  const leave = () => pinned || caption.contains(document.activeElement) || set(false);
  caption.addEventListener("pointerenter", (event) => {
    if (event.pointerType === "mouse") timer = setTimeout(() => set(true), 150);
  });
  caption.addEventListener("pointerleave", () => {
    clearTimeout(timer);
    leave();
  });
  caption.addEventListener("focusin", () => button.matches(":focus-visible") && set(true));
  caption.addEventListener("focusout", (event) => pinned || caption.contains(event.relatedTarget) || set(false));
  button.addEventListener("click", () => {
    const keep = !pinned;
    set(keep);
    pinned = keep;
  });
  caption.addEventListener("keydown", (event) => event.key === "Escape" && set(false));
}

/* The grid of a batch. */

class Sweep {
  constructor(section) {
    const data = JSON.parse(section.querySelector(".data").textContent);
    Object.assign(this, data);
    this.section = section;
    this.cards = [...section.querySelectorAll(".card")];
    this.pool = section.querySelector(".pool");
    this.tableRows = [...section.querySelectorAll(".jobs tbody tr")];
    this.layout = section.querySelector(".layout");
    this.picked = new Map(); // setting -> the value that is shown, or NONE for all
    this.page = 0;
    this.byValues = new Map(this.jobs.map((job, i) => [this.key(job.at, job.twin), i]));
    this.measured = new Map(this.pairs.map(([a, b, ...found]) => [`${a} ${b}`, found]));
    this.baseline = this.baselines()[0] ?? NONE;
    this.player = this.frame ? new Player(section.querySelector(".player"), this.frame) : null;
    this.cards.forEach(makePanel);
    this.pickFirst();
    this.render();
  }

  key(at, twin) {
    return [...at, twin].join(" ");
  }

  get others() {
    return this.settings.map((_, i) => i).filter((i) => i !== this.rows && i !== this.columns);
  }

  /* Where several settings are left for one cell, show the first value alone, of seeds before others. */
  pickFirst() {
    this.picked.clear();
    this.page = 0;
    let inACell = this.others.reduce((product, i) => product * this.settings[i].values.length, 1);
    const ordered = [...this.others].sort((a, b) => (this.settings[b].name === "seed") - (this.settings[a].name === "seed"));
    for (const i of ordered) {
      this.picked.set(i, inACell > MOST_IN_A_CELL ? 0 : NONE);
      if (inACell > MOST_IN_A_CELL) inACell /= this.settings[i].values.length;
    }
  }

  /* The values of the columns that something was compared with. */
  baselines() {
    if (this.columns === NONE || !this.pairs.length) return [];
    if (this.only) return this.only[0] === this.columns ? [this.only[1]] : [];
    const differ = (a, b) => this.jobs[a].at[this.columns] !== this.jobs[b].at[this.columns];
    const found = this.pairs.filter(([a, b]) => differ(a, b)).flatMap(([a, b]) => [a, b].map((i) => this.jobs[i].at[this.columns]));
    return [...new Set(found)].sort((a, b) => a - b);
  }

  select(name, options, value, change) {
    const id = `${this.section.id}-${name.replace(/\W+/g, "-")}-${this.layout.childElementCount}`;
    const made = element("select", { id });
    for (const [key, text] of options) made.append(element("option", { value: key }, text));
    made.value = value;
    made.addEventListener("change", () => {
      change(Number(made.value));
      this.render();
      document.getElementById(id)?.focus(); // the selects were made anew
    });
    this.layout.append(element("span", { class: "choice" }, element("label", { for: id }, name), made));
  }

  drawLayout(pages) {
    this.layout.replaceChildren();
    const names = [[NONE, "nothing"], ...this.settings.map((setting, i) => [i, setting.name])];
    const axis = (mine, other) => (value) => {
      if (value !== NONE && value === this[other]) this[other] = this[mine];
      this[mine] = value;
      this.baseline = this.baselines()[0] ?? NONE;
      this.pickFirst();
    };
    if (this.settings.length) {
      this.select("Rows", names, this.rows, axis("rows", "columns"));
      this.select("Columns", names, this.columns, axis("columns", "rows"));
    }
    for (const i of this.others) {
      const { name, values } = this.settings[i];
      this.select(name, [[NONE, "all"], ...values.map((text, k) => [k, this.short(text)])], this.picked.get(i), (value) => {
        this.picked.set(i, value);
        this.page = 0;
      });
    }
    const baselines = this.baselines();
    if (baselines.length) {
      const { name, values } = this.settings[this.columns];
      this.select("Baseline", [[NONE, "none"], ...baselines.map((k) => [k, `${name} = ${this.short(values[k])}`])], this.baseline, (value) => {
        this.baseline = value;
      });
    }
    if (pages.length > 1) {
      const listed = pages.map((lines, k) => [k, `${lines[0] + 1} to ${lines.at(-1) + 1}`]);
      this.select("Lines", listed, this.page, (value) => {
        this.page = value;
      });
    }
  }

  short(text) {
    return text.length > 60 ? `${text.slice(0, 57)}…` : text;
  }

  valuesOf(setting) {
    return setting === NONE ? [NONE] : this.settings[setting].values.map((_, i) => i);
  }

  /* For each row and column the jobs to show. */
  cells() {
    const shown = this.jobs.map((job, i) => i).filter((i) => this.others.every((k) => [NONE, this.jobs[i].at[k]].includes(this.picked.get(k))));
    const found = new Map();
    for (const i of shown) {
      const at = this.jobs[i].at;
      const place = `${this.rows === NONE ? NONE : at[this.rows]} ${this.columns === NONE ? NONE : at[this.columns]}`;
      found.set(place, [...(found.get(place) ?? []), i]);
    }
    return (row, column) => found.get(`${row} ${column}`) ?? [];
  }

  render() {
    const cells = this.cells();
    const columns = this.valuesOf(this.columns);
    const lines = this.valuesOf(this.rows).map((row) => [row, columns.map((column) => cells(row, column))]).filter(([, each]) => each.some((jobs) => jobs.length));
    const pages = [];
    let room = 0;
    lines.forEach(([, each], k) => {
      const count = each.flat().length;
      if (count > room) {
        pages.push([]);
        room = MOST_VIDEOS;
      }
      pages.at(-1).push(k);
      room -= count;
    });
    this.page = Math.max(0, Math.min(this.page, pages.length - 1));
    this.drawLayout(pages);
    const visible = (pages[this.page] ?? []).map((k) => lines[k]);

    const table = element("table");
    if (this.columns !== NONE) {
      const heads = columns.map((column) => this.head(this.columns, column, "col"));
      table.append(element("thead", {}, element("tr", {}, ...heads)));
    }
    const jobs = visible.flatMap(([, each]) => each.flat());
    this.pool.append(...this.cards);
    for (const [row, each] of visible) {
      const body = element("tbody");
      if (this.rows !== NONE) {
        const head = this.head(this.rows, row, "rowgroup");
        head.colSpan = columns.length;
        body.append(element("tr", {}, head));
      }
      const filled = each.map((these) => element("td", {}, these.length ? element("div", { class: "cell" }, ...these.map((i) => this.cards[i])) : element("span", { class: "nothing" }, "no job")));
      body.append(element("tr", {}, ...filled));
      table.append(body);
    }
    const inACell = Math.max(1, ...visible.flatMap(([, each]) => each.map((these) => these.length)));
    const aspects = jobs.map((i) => this.cards[i].querySelector("video")).filter(Boolean).map((video) => video.width / video.height);
    const widest = Math.min(480, LARGEST * Math.max(...aspects, 0.5)); // so that two rows are seen at once
    table.style.minWidth = `${columns.length * Math.min(inACell, 2) * 116}px`;
    table.style.maxWidth = `${columns.length * inACell * (widest + 12)}px`;
    this.section.querySelector(".grid").replaceChildren(table);
    this.load(new Set(jobs));
    this.measure();
    this.describe(jobs.length, visible.length, columns.length);
  }

  head(setting, value, scope) {
    const { name, values } = this.settings[setting];
    const made = element("th", { scope, dir: "auto" }, element("small", {}, name), " ", this.clipped(values[value]));
    if (scope === "col" && value === this.baseline) made.append(element("small", {}, " (baseline)"));
    return made;
  }

  clipped(text) {
    return text.length > 300 ? `${text.slice(0, 299)}…` : text;
  }

  /* Give the shown videos their data, and take them from the others. */
  load(shown) {
    this.cards.forEach((card, i) => {
      const video = card.querySelector("video");
      if (!video) return;
      if (shown.has(i) && !video.hasAttribute("src")) {
        video.muted = true;
        video.src = video.dataset.src;
      } else if (!shown.has(i) && video.hasAttribute("src")) {
        video.removeAttribute("src");
        video.load();
      }
    });
    this.player?.show([...shown].map((i) => this.cards[i].querySelector("video")).filter(Boolean));
  }

  /* What one job is apart from the one of its row in the baseline's column. */
  found(i) {
    if (this.baseline === NONE) return null;
    const at = [...this.jobs[i].at];
    if (at[this.columns] === this.baseline) return "baseline";
    at[this.columns] = this.baseline;
    const other = this.byValues.get(this.key(at, this.jobs[i].twin));
    return this.measured.get(`${i} ${other}`) ?? this.measured.get(`${other} ${i}`) ?? null;
  }

  measure() {
    this.cards.forEach((card, i) => {
      const found = this.found(i);
      const rest = this.others.filter((k) => this.picked.get(k) === NONE);
      card.querySelector(".rest").textContent = rest.map((k) => `${this.settings[k].name} ${this.short(this.settings[k].values[this.jobs[i].at[k]])}`).join(", ");
      let said = "";
      let numbers = { psnr: "", ssim: "", max_abs: "" };
      if (found === "baseline") said = "the baseline";
      else if (found?.length === 1) said = `not compared: ${found[0]}`;
      else if (found) {
        const [psnr, ssim, most] = found;
        numbers = { psnr: psnr ?? Infinity, ssim, max_abs: most };
        said = psnr === null ? "equal to the baseline" : `PSNR ${psnr.toFixed(1)} dB, SSIM ${ssim.toFixed(3)}, max ${most}`;
      }
      card.querySelector(".metrics").textContent = said;
      const texts = { psnr: (x) => (x === Infinity ? "∞" : x.toFixed(1)), ssim: (x) => x.toFixed(3), max_abs: String };
      for (const cell of this.tableRows.length ? this.rowOf(i).querySelectorAll("[data-measure]") : []) {
        const number = numbers[cell.dataset.measure];
        cell.textContent = number === "" ? "" : texts[cell.dataset.measure](number);
        if (number === "") delete cell.dataset.value;
        else cell.dataset.value = number;
      }
    });
  }

  rowOf(i) {
    return this.tableRows[i]; // as they were written, whatever the order now
  }

  describe(jobs, rows, columns) {
    const count = (number, what) => `${number} ${what}${number === 1 ? "" : "s"}`;
    const parts = [`${count(jobs, "job")} of ${this.jobs.length}, in ${count(rows, "row")} and ${count(columns, "column")}.`];
    if (this.baseline !== NONE) {
      const { name, values } = this.settings[this.columns];
      parts.push(`PSNR, SSIM and the largest difference of a value of 255 are to the video of the same row with ${name} = ${this.short(values[this.baseline])}.`);
    }
    this.section.querySelector(".status").textContent = parts.join(" ");
  }
}

document.querySelectorAll("table.sortable").forEach(makeSortable);
document.querySelectorAll("section.sweep").forEach((section) => new Sweep(section));
