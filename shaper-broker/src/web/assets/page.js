// What a page does by itself: it asks for itself again when the broker says that something is another than before, and draws
// the charts of a task. Without this script a page is as it was loaded.
"use strict";

(() => {
  const state = document.getElementById("state");
  const say = (text, isStale) => {
    if (!state) return;
    state.classList.toggle("stale", Boolean(isStale));
    if (state.textContent !== text) state.textContent = text;
  };

  // Puts what is new in place of what was, and the focus back where it was.
  const replace = (fresh) => {
    const old = document.getElementById("live");
    const next = fresh.getElementById("live");
    if (!old || !next || old.innerHTML === next.innerHTML) return true;
    // Whoever reads something that was unfolded, or has marked text, is not disturbed.
    if (old.querySelector("details[open]") || !document.getSelection().isCollapsed) return false;
    const aside = [...old.querySelectorAll(".scroll")].map((table) => table.scrollLeft);
    const focused = document.activeElement;
    const has = old.contains(focused);
    const place = has ? [...old.querySelectorAll("a, [tabindex], summary")].indexOf(focused) : -1;
    const address = has && focused.getAttribute("href");
    old.replaceChildren(...next.childNodes);
    old.querySelectorAll(".scroll").forEach((table, at) => { table.scrollLeft = aside[at] || 0; });
    if (!has) return true;
    const all = [...old.querySelectorAll("a, [tabindex], summary")];
    const same = all.find((element) => address && element.getAttribute("href") === address) || all[place];
    if (same) same.focus({ preventScroll: true });
    return true;
  };

  // This page, without what was tried on it.
  const address = () => {
    const here = new URL(location.href);
    here.searchParams.delete("policy");
    return here.href;
  };
  const soon = () => AbortSignal.timeout(10000);

  let isAsking = false;
  const refresh = async () => {
    if (isAsking || document.hidden) return;
    isAsking = true;
    try {
      const response = await fetch(address(), { credentials: "same-origin", headers: { accept: "text/html" }, signal: soon() });
      if (response.status === 401) {
        say("the session is over: run shaper ui", true);
        return;
      }
      if (!response.ok) {
        say("the broker does not answer as it should; what is shown is old", true);
        return;
      }
      const isNew = replace(new DOMParser().parseFromString(await response.text(), "text/html"));
      say(isNew ? "live" : "paused while something is unfolded or marked", !isNew);
      await draw();
    } catch {
      say("the broker does not answer; what is shown is old", true);
    } finally {
      isAsking = false;
    }
  };

  const charts = document.querySelector("[data-usage]");
  const drawn = new Map();
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const bytes = (value) => {
    if (value == null) return "–";
    const units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let unit = 0;
    while (value >= 1024 && unit < units.length - 1) { value /= 1024; unit += 1; }
    return `${Number(value.toFixed(value < 10 ? 1 : 0))} ${units[unit]}`;
  };
  const bits = (value) => {
    if (value == null) return "–";
    const units = ["bit/s", "kbit/s", "Mbit/s", "Gbit/s"];
    let unit = 0;
    while (value >= 1000 && unit < units.length - 1) { value /= 1000; unit += 1; }
    return `${Number(value.toFixed(value < 10 ? 1 : 0))} ${units[unit]}`;
  };
  const cores = (value) => (value == null ? "–" : `${Number(value.toFixed(2))}`);

  // A line for each decision, with its name at the top.
  const marks = (decisions) => ({
    hooks: {
      draw: [(plot) => {
        const { ctx, bbox } = plot;
        ctx.save();
        ctx.strokeStyle = ctx.fillStyle = colour("--wait");
        ctx.setLineDash([4, 3]);
        ctx.font = `${11 * devicePixelRatio}px system-ui`;
        let line = 0;
        for (const decision of decisions()) {
          const { min, max } = plot.scales.x;
          if (decision.at < min || decision.at > max) continue;
          const x = Math.round(plot.valToPos(decision.at, "x", true));
          ctx.beginPath();
          ctx.moveTo(x, bbox.top);
          ctx.lineTo(x, bbox.top + bbox.height);
          ctx.stroke();
          ctx.fillText(decision.kind, x + 3 * devicePixelRatio, bbox.top + (12 + 12 * (line % 3)) * devicePixelRatio);
          line += 1;
        }
        ctx.restore();
      }],
    },
  });

  const SUBJECTS = [
    { name: "CPU, cores", shown: cores, lines: [
      ["used", (usage) => usage.cpu, "--accent"],
      ["in force", (usage) => usage.cpu_limit, "--bad"],
      ["request", (usage) => usage.request_cpu, "--quiet"],
    ] },
    { name: "Memory", shown: bytes, lines: [
      ["used", (usage) => usage.memory, "--accent"],
      ["in force", (usage) => usage.memory_limit, "--bad"],
      ["request", (usage) => usage.request_memory, "--quiet"],
    ] },
    { name: "Network", shown: bits, lines: [
      ["sent", (usage) => usage.sent, "--accent"],
      ["received", (usage) => usage.received, "--good"],
      ["limit", (usage) => usage.net_limit, "--bad"],
      ["granted", (usage) => usage.net_granted, "--wait"],
      ["request", (usage) => usage.request_network, "--quiet"],
    ] },
    { name: "Throttled, share of the time", shown: cores, lines: [
      ["throttled", (usage) => usage.throttled, "--wait"],
    ] },
  ];

  const width = (place) => Math.max(place.clientWidth - 16, 200);
  // The first chart has the whole row until the next is there.
  const fit = () => {
    for (const { plot, place } of drawn.values()) {
      if (plot.width !== width(place)) plot.setSize({ width: width(place), height: 200 });
    }
  };

  let latest = { decisions: [] };
  const draw = async () => {
    if (!charts || !window.uPlot) return;
    const response = await fetch(charts.dataset.usage, { credentials: "same-origin", signal: soon() });
    if (!response.ok) return;
    const usage = await response.json();
    latest = usage;
    if (usage.at.length < 2) {
      if (!charts.children.length) {
        const note = document.createElement("p");
        note.className = "empty";
        note.textContent = "Nothing was measured yet, or not any more: a sample is taken each five seconds while the task runs.";
        charts.append(note);
      }
      return;
    }
    if (!drawn.size) charts.replaceChildren();
    for (const subject of SUBJECTS) {
      const lines = subject.lines.filter(([, of]) => of(usage).some((value) => value != null));
      const data = [usage.at, ...lines.map(([, of]) => of(usage))];
      const key = `${lines.map(([name]) => name)}`;
      const before = drawn.get(subject.name);
      if (before && before.key === key) {
        before.plot.setData(data);
        continue;
      }
      if (before) {
        before.plot.destroy();
        before.place.remove();
        drawn.delete(subject.name);
      }
      if (!lines.length) continue;
      const place = document.createElement("div");
      place.className = "chart";
      place.setAttribute("role", "img");
      place.setAttribute("aria-label", `${subject.name} over time; the figures of now are in the table below`);
      const title = document.createElement("h2");
      title.textContent = subject.name;
      place.append(title);
      charts.append(place);
      const axis = { stroke: colour("--quiet"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line") } };
      const plot = new uPlot({
        width: width(place),
        height: 200,
        plugins: [marks(() => latest.decisions)],
        scales: { y: { range: (_, low, high) => [0, Math.max(high || 0, low || 0) * 1.1 || 1] } },
        axes: [axis, { ...axis, size: 76, values: (_, values) => values.map(subject.shown) }],
        series: [{ label: "at" }, ...lines.map(([label, , name]) => ({
          label, stroke: colour(name), width: 2, value: (_, value) => subject.shown(value),
        }))],
      }, data, place);
      drawn.set(subject.name, { key, plot, place });
    }
    fit();
  };
  addEventListener("resize", fit);
  // Colours are drawn, not styled.
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const { plot, place } of drawn.values()) { plot.destroy(); place.remove(); }
    drawn.clear();
    draw();
  });

  if (charts) draw().catch(() => say("the charts cannot be loaded", true));
  if (document.getElementById("live")) {
    let news = null;
    // A tab that nobody sees hears nothing: a browser makes few connections to one server.
    const listen = () => {
      if (document.hidden) {
        if (news) news.close();
        news = null;
        return;
      }
      if (news && news.readyState !== EventSource.CLOSED) return;
      news = new EventSource("/live");
      news.addEventListener("begin", () => say("live"));
      news.addEventListener("news", refresh);
      news.addEventListener("error", () => {
        say("the broker does not answer; what is shown is old", true);
        // It was refused: the page says why, and it is tried again.
        if (news && news.readyState === EventSource.CLOSED) {
          refresh();
          setTimeout(listen, 10000);
        }
      });
    };
    listen();
    document.addEventListener("visibilitychange", () => { listen(); refresh(); });
  }
})();
