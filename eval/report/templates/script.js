"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const make = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name in node) node[name] = value; else node.setAttribute(name, value);
    }
    node.append(...children);
    return node;
  };

  // --- the answer ---
  if (data.answer && $("choose")) {
    const show = () => {
      const least = Number($("least").value);
      $("least-out").textContent = `${least} dB`;
      const best = data.answer.steps[least - data.answer.low];
      if (!best) {
        $("verdict").replaceChildren("Dense attention: no method here is near enough.");
        return;
      }
      const parts = [make("b", { textContent: best.method })];
      if (best.setting) parts.push(` at ${best.setting}`);
      if (best.speedup) parts.push(": ", make("b", { textContent: best.speedup }), " the speed of dense");
      if (best.pairs) parts.push(`, ${best.pairs} of the pairs computed`);
      const spans = [`PSNR ${best.psnr}${best.psnr_span ? ` (${best.psnr_span})` : ""}`];
      if (best.speedup_span) spans.push(`speed-up ${best.speedup_span}`);
      $("verdict").replaceChildren(...parts, make("small", { textContent: spans.join(" · ") }));
    };
    $("least").addEventListener("input", show);
    $("choose").hidden = false;
    show();
  }

  // --- plots ---
  if ($("measure")) {
    $("measure").addEventListener("change", () => {
      for (const pair of document.querySelectorAll(".pair")) {
        pair.hidden = pair.dataset.measure !== $("measure").value;
      }
    });
  }

  // --- tables that sort ---
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    const body = table.tBodies[0];
    const key = (row, i) => {
      const cell = row.cells[i];
      const text = "sort" in cell.dataset ? cell.dataset.sort : cell.textContent.trim();
      if (text === "" || text === "—") return null;
      const number = Number(text.replace(/[%,+]/g, "").replace("−", "-"));
      return Number.isNaN(number) ? text : number;
    };
    heads.forEach((head, i) => head.querySelector("button").addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      const first = head.dataset.better === "higher" ? "descending" : "ascending";
      const turned = now === "ascending" ? "descending" : "ascending";
      const order = now === "none" ? first : turned;
      heads.forEach((other) => other.setAttribute("aria-sort", other === head ? order : "none"));
      const sign = order === "ascending" ? 1 : -1;
      const rows = [...body.rows].map((row) => [key(row, i), row]);
      rows.sort(([a], [b]) => {
        if (a === null || b === null) return (a === null) - (b === null);
        if (typeof a === "number" && typeof b === "number") return sign * (a - b);
        return sign * String(a).localeCompare(String(b));
      });
      body.append(...rows.map(([, row]) => row));
    }));
  }

  // --- players ---
  const { players } = data;
  const grid = $("grid");
  if (grid && players.prompts.length) {
    const moving = players.frames > 1;
    let cards = [];
    let playing = false;
    let wanted = 0;
    const videos = () => cards.flatMap((card) => card.videos);
    const middle = (frame) => (frame + 0.5) / players.fps;

    const picture = (clip, role) => {
      if (!moving) return make("img", { src: clip.file, alt: clip.variant, className: role });
      const video = make("video", { muted: true, playsInline: true, preload: "auto", className: role, src: clip.file });
      if (role === "own") video.poster = clip.poster;
      video.setAttribute("aria-label", clip.variant);
      video.tabIndex = -1;
      return video;
    };
    const differs = () => document.querySelector('input[name="view"]:checked').value === "difference";

    const build = () => {
      pause();
      wanted = 0;
      const { clips } = players.prompts[Number($("prompt").value)];
      const dense = clips.find((clip) => clip.role === "dense");
      document.querySelector(".gain").hidden = !differs();
      cards = clips.map((clip) => {
        const stage = make("div", { className: "stage" });
        stage.style.setProperty("--ratio", players.ratio);
        const own = picture(clip, "own");
        stage.append(own);
        const shown = [own];
        if (differs() && dense && clip !== dense) {
          shown.push(picture(dense, "other"));
          stage.append(shown[1]);
          stage.style.filter = `brightness(${$("gain").value})`;
        }
        own.addEventListener("error", () => stage.append(make("p", { textContent: "This clip cannot be shown here." })));
        const old = document.querySelector(`.card[data-variant="${CSS.escape(clip.variant)}"] .mark`);
        const caption = make("figcaption");
        const mark = marks.get(clip.variant) || old;
        if (mark) { marks.set(clip.variant, mark); caption.append(mark.cloneNode(true)); }
        caption.append(make("strong", { textContent: clip.variant }), make("span", { textContent: clip.notes.join(" · ") }));
        const card = make("figure", { className: "card" }, stage, caption);
        card.dataset.variant = clip.variant;
        return { card, videos: moving ? shown : [] };
      });
      grid.replaceChildren(...cards.map(({ card }) => card));
      for (const video of videos()) video.addEventListener("loadeddata", () => place(video), { once: true });
      tell();
    };
    const marks = new Map();
    document.querySelectorAll("#grid .card").forEach((card, i) => {
      const mark = card.querySelector(".mark");
      if (mark) marks.set(players.prompts[0].clips[i].variant, mark);
    });

    const tell = () => {
      if (!moving) return;
      $("seek").value = wanted;
      $("frame").textContent = `${wanted + 1} / ${players.frames}`;
      $("play").textContent = playing ? "Pause" : "Play";
      $("play").setAttribute("aria-pressed", String(playing));
    };
    const place = (video) => { video.currentTime = Math.min(middle(wanted), (video.duration || Infinity) - 1e-3); };
    const seek = (frame) => {
      wanted = (frame + players.frames) % players.frames;
      for (const video of videos()) place(video);
      tell();
    };
    const pause = () => {
      playing = false;
      for (const video of videos()) video.pause();
      tell();
    };
    // one clock for all: the first clip's, and whoever strays is put back
    const follow = () => {
      if (!playing) return;
      const [first, ...others] = videos();
      if (first.ended || first.currentTime >= players.frames / players.fps - 0.01) {
        for (const video of videos()) { video.currentTime = 0; video.play().catch(() => {}); }
      } else {
        for (const video of others) {
          if (Math.abs(video.currentTime - first.currentTime) > 0.75 / players.fps) video.currentTime = first.currentTime;
          if (video.paused && !video.ended) video.play().catch(() => {});
        }
      }
      wanted = Math.min(players.frames - 1, Math.floor(first.currentTime * players.fps));
      tell();
      requestAnimationFrame(follow);
    };
    const play = async () => {
      if (playing) { pause(); return; }
      playing = true;
      tell();
      for (const video of videos()) if (video.ended) video.currentTime = 0;
      await Promise.allSettled(videos().map((video) => video.play()));
      requestAnimationFrame(follow);
    };

    $("prompt").addEventListener("change", build);
    document.querySelectorAll('input[name="view"]').forEach((radio) => radio.addEventListener("change", build));
    $("gain").addEventListener("input", () => {
      $("gain-out").textContent = $("gain").value;
      for (const { card } of cards) {
        const stage = card.querySelector(".stage");
        if (stage.style.filter) stage.style.filter = `brightness(${$("gain").value})`;
      }
    });
    if (moving) {
      $("play").addEventListener("click", play);
      $("back").addEventListener("click", () => { pause(); seek(wanted - 1); });
      $("next").addEventListener("click", () => { pause(); seek(wanted + 1); });
      $("seek").addEventListener("input", () => { pause(); seek(Number($("seek").value)); });
      let near = false;
      new IntersectionObserver(([entry]) => { near = entry.isIntersecting; }).observe($("clips"));
      document.addEventListener("keydown", (event) => {
        const tag = event.target.tagName;
        if (!near || event.ctrlKey || event.metaKey || event.altKey || ["INPUT", "SELECT", "TEXTAREA"].includes(tag)) return;
        if (event.key === " " && tag !== "BUTTON" && tag !== "SUMMARY") { event.preventDefault(); play(); }
        if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
          event.preventDefault();
          pause();
          seek(wanted + (event.key === "ArrowLeft" ? -1 : 1));
        }
      });
    }
    build();
  }

  // --- attention maps ---
  const maps = data.attention;
  if (maps && $("maps")) {
    const fill = (select, values) => select.append(...values.map((value) => make("option", { value, textContent: value })));
    fill($("map-layer"), maps.layers);
    fill($("map-step"), maps.steps);
    fill($("map-head"), maps.heads);
    const swatch = (colour) => {
      const mark = make("span", { className: "mark" });
      mark.style.cssText = `background:${colour};display:inline-block;border-radius:2px`;
      return mark;
    };
    const short = (value) => (value >= 0.1 ? value.toFixed(2) : value.toPrecision(2));
    const show = () => {
      const errors = document.querySelector('input[name="map"]:checked').value === "error";
      const place = [$("map-layer").value, $("map-step").value, $("map-head").value].join("|");
      const found = maps.candidates.map((name) => [name, maps.maps[`${name}|${place}`]]);
      const used = new Set(found.flatMap(([, map]) => (map ? map.shares.map((share) => share.kind) : [])));
      const any = found.find(([, map]) => map);
      if (errors && any) {
        const bar = make("span", { className: "rampbar" }, ...maps.ramp.map((colour) => {
          const part = make("i");
          part.style.background = colour;
          return part;
        }));
        const top = any[1].top;
        $("map-legend").replaceChildren(
          make("span", {}, `≤ ${short(top / 10 ** maps.decades)}`, bar, `${short(top)}, logarithmic`));
      } else {
        $("map-legend").replaceChildren(...maps.kinds.flatMap((kind, i) => (used.has(kind)
          ? [make("span", {}, swatch(maps.palette[i]), kind)] : [])));
      }
      $("map-grid").replaceChildren(...found.map(([name, map]) => {
        const caption = make("figcaption", { textContent: name });
        if (!map) return make("figure", {}, caption, make("p", { className: "small", textContent: "Dense here." }));
        const image = make("img", { src: errors ? map.error : map.kind, alt: `${name}, ${errors ? "error" : "kind"} of each pair` });
        image.style.setProperty("--shape", `${map.blocks[1] * (errors ? 1.06 : 1)} / ${map.blocks[0]}`);
        const rows = map.shares.map((share) => make("tr", {},
          make("th", { scope: "row" }, swatch(maps.palette[maps.kinds.indexOf(share.kind)]), share.kind),
          make("td", { textContent: `${(100 * share.share).toFixed(1)}%` }),
          make("td", { textContent: short(share.error) })));
        rows.push(make("tr", {}, make("th", { scope: "row", textContent: "whole output" }), make("td"), make("td", { textContent: short(map.row) })));
        const head = make("thead", {}, make("tr", {}, make("th"), make("th", { textContent: "pairs" }), make("th", { textContent: "error" })));
        return make("figure", {}, caption, image, make("table", {}, head, make("tbody", {}, ...rows)));
      }));
    };
    for (const id of ["map-layer", "map-step", "map-head"]) $(id).addEventListener("change", show);
    document.querySelectorAll('input[name="map"]').forEach((radio) => radio.addEventListener("change", show));
    $("maps").hidden = false;
    show();
  }
})();
