// The web page in Chromium: `node page.mjs ADDRESS`, where ADDRESS is what `shaper ui` printed. tests/tests/browser/main.rs starts
// a broker with agents and tasks behind it, and this program, which ends with 0 if all is as it should be and prints one line of JSON
// with what it measured. SHAPER_TASK names a task that runs and may be cancelled, SHAPER_CANCEL how; with SHAPER_SHOTS, a
// folder, pictures are left there.

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { join } from "node:path";
import { chromium } from "playwright-core";

const [address] = process.argv.slice(2);
const { SHAPER_TASK: task, SHAPER_CANCEL: cancel, SHAPER_SHOTS: shots, SHAPER_CHROMIUM: program } = process.env;
const origin = new URL(address).origin;
const DESKTOP = { width: 1280, height: 800 };
const PHONE = { width: 390, height: 844 };
const PATIENCE = 60000;

const browser = await chromium.launch({
  executablePath: program || "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync"],
});
const faults = [];

// A page on which nothing may go wrong unseen: no error, no word of the content security policy, no request to elsewhere.
const watched = async (options) => {
  const context = await browser.newContext(options);
  context.setDefaultTimeout(PATIENCE);
  const page = await context.newPage();
  page.on("console", (message) => { if (message.type() === "error") faults.push(`console: ${message.text()}`); });
  page.on("pageerror", (error) => faults.push(`script: ${error.message}`));
  page.on("request", (request) => {
    if (!request.url().startsWith(origin)) faults.push(`asked ${request.url()}`);
  });
  return { context, page };
};

const live = (page) => page.waitForFunction(() => document.getElementById("state")?.textContent === "live");
const shot = async (page, name) => {
  if (shots) await page.screenshot({ path: join(shots, `${name}.png`) });
};
const luminance = (page) => page.evaluate(() => {
  const [red, green, blue] = getComputedStyle(document.body).backgroundColor.match(/\d+/g).map(Number);
  return (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255;
});
const charts = async (page) => {
  await page.waitForFunction(() => document.querySelectorAll(".chart canvas").length >= 2, null, { timeout: PATIENCE });
  return page.evaluate(() => [...document.querySelectorAll(".chart canvas")].map((canvas) => {
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    const drawn = new Set();
    for (let at = 0; at < data.length; at += 4) if (data[at + 3]) drawn.add(`${data[at]},${data[at + 1]},${data[at + 2]}`);
    return drawn.size;
  }));
};

try {
  const { context, page } = await watched({ viewport: DESKTOP, colorScheme: "light" });

  // Without a cookie there is nothing but the way in.
  const stranger = await page.goto(`${origin}/`);
  assert.equal(stranger.status(), 401);
  assert.match(await page.textContent("main"), /shaper ui/);
  faults.length = 0; // The browser tells of the 401.

  await page.goto(address);
  assert.equal(new URL(page.url()).pathname, "/", "the code leads to the overview");
  await live(page);
  const cookies = await context.cookies();
  assert.ok(cookies.every((cookie) => cookie.httpOnly && cookie.sameSite === "Strict"), JSON.stringify(cookies));
  const again = await context.request.get(address, { maxRedirects: 0 });
  assert.equal(again.status(), 401, "a code works once");

  // How soon something is there, and how much was sent for it, with nothing in the cache.
  const fresh = await browser.newContext({ viewport: DESKTOP, storageState: await context.storageState() });
  const first = await fresh.newPage();
  await first.goto(`${origin}/`);
  await first.waitForFunction(() => performance.getEntriesByName("first-contentful-paint").length > 0);
  const measured = await first.evaluate(() => {
    const entries = [...performance.getEntriesByType("navigation"), ...performance.getEntriesByType("resource")];
    const bytes = entries.reduce((sum, entry) => sum + (entry.transferSize || 0), 0);
    const [paint] = performance.getEntriesByName("first-contentful-paint");
    return { first_paint_ms: paint.startTime, bytes, requests: entries.length };
  });
  await fresh.close();

  // Every page of the menu, wide and narrow: a title, one heading, nothing beside the screen.
  const addresses = await page.$$eval("nav a", (links) => links.map((link) => link.getAttribute("href")));
  assert.deepEqual(addresses.slice(0, 3), ["/", "/tasks", "/nodes"]);
  for (const path of [...addresses, `/tasks/${task}`, "/nodes/n1"]) {
    for (const viewport of [DESKTOP, PHONE]) {
      await page.setViewportSize(viewport);
      const response = await page.goto(origin + path);
      assert.equal(response.status(), 200, path);
      assert.match(await page.title(), / · shaper$/, path);
      assert.equal(await page.locator("h1").count(), 1, path);
      const over = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
      assert.ok(over <= 0, `${path} is ${over} px wider than ${viewport.width}`);
      const nameless = await page.$$eval("a, button, input, select, textarea, summary", (all) => all
        .filter((one) => !(one.textContent.trim() || one.getAttribute("aria-label") || one.labels?.length))
        .map((one) => one.outerHTML));
      assert.deepEqual(nameless, [], `${path}: what has no name cannot be read out`);
    }
  }

  // By keyboard: first the way past the menu, then along it.
  await page.setViewportSize(DESKTOP);
  await page.goto(`${origin}/`);
  await page.keyboard.press("Tab");
  assert.equal(await page.evaluate(() => document.activeElement.className), "skip");
  await page.keyboard.press("Enter");
  assert.equal(new URL(page.url()).hash, "#main");
  await page.locator("nav a", { hasText: "Tasks" }).focus();
  await page.keyboard.press("Enter");
  await page.waitForURL(`${origin}/tasks`);
  const ring = await page.evaluate(() => {
    document.querySelector("nav a").focus();
    return getComputedStyle(document.activeElement).outlineStyle;
  });
  assert.notEqual(ring, "none", "where the focus is can be seen");

  // The task: what it used, drawn, in the light and in the dark.
  await page.goto(`${origin}/tasks/${task}`);
  await live(page);
  const colours = await charts(page);
  assert.ok(colours.every((count) => count > 8), `the charts are empty: ${colours}`);
  assert.match(await page.getAttribute(".chart", "aria-label"), /over time/);
  for (const viewport of [PHONE, DESKTOP]) {
    await page.setViewportSize(viewport);
    await page.waitForFunction(() => [...document.querySelectorAll(".chart")]
      .every((chart) => chart.scrollWidth <= chart.clientWidth));
  }
  await shot(page, "task");
  const light = await luminance(page);
  await page.emulateMedia({ colorScheme: "dark" });
  await page.waitForFunction(() => document.querySelectorAll(".chart canvas").length >= 2);
  const dark = await luminance(page);
  assert.ok(light > 0.8 && dark < 0.2, `light ${light}, dark ${dark}`);
  assert.ok((await charts(page)).every((count) => count > 8));
  await shot(page, "task-dark");
  await page.emulateMedia({ colorScheme: "light" });

  await page.goto(`${origin}/`);
  await live(page);
  await shot(page, "overview");
  await page.emulateMedia({ colorScheme: "dark" });
  await shot(page, "overview-dark");
  await page.emulateMedia({ colorScheme: "light" });
  await page.setViewportSize(PHONE);
  await shot(page, "overview-phone");
  await page.setViewportSize(DESKTOP);
  await page.goto(`${origin}/tasks`);
  await live(page);
  await shot(page, "tasks");

  // What happens is shown without anybody asking, and what has the focus keeps it.
  await page.goto(`${origin}/tasks/${task}`);
  await live(page);
  const focused = page.locator("#live a").first();
  await focused.focus();
  const before = await focused.getAttribute("href");
  execFileSync("/bin/sh", ["-c", cancel], { stdio: "inherit" });
  await page.waitForFunction(() => /cancelled/.test(document.querySelector("#live").textContent));
  assert.equal(await page.evaluate(() => document.activeElement.getAttribute("href")), before);

  // A broker that does not answer is told from one that does.
  await context.setOffline(true);
  await page.waitForFunction(() => document.getElementById("state").classList.contains("stale"));
  faults.splice(0, faults.length, ...faults.filter((fault) => !/ERR_INTERNET_DISCONNECTED/.test(fault)));
  await context.setOffline(false);

  assert.deepEqual(faults, []);
  assert.ok(measured.bytes < 300 * 1024, `${measured.bytes} bytes for the first page`);
  console.log(JSON.stringify(measured));
} catch (error) {
  console.error(faults.length ? `${faults.join("\n")}\n` : "", error);
  process.exitCode = 1;
} finally {
  await browser.close();
}
