// Measures a page from within, once it is loaded, and tells the page that shows it.
const errors = [];
addEventListener("error", (event) => errors.push(event.message));
addEventListener("securitypolicyviolation", (event) => errors.push(event.violatedDirective));

function channels(color) {
  const found = color.match(/[\d.]+/g).map(Number);
  return { rgb: found.slice(0, 3), alpha: found[3] ?? 1 };
}

function luminance(rgb) {
  const linear = rgb.map((one) => one / 255)
    .map((one) => (one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4));
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
}

function background(element) {
  for (let one = element; one; one = one.parentElement) {
    const { rgb, alpha } = channels(getComputedStyle(one).backgroundColor);
    if (alpha === 1) return rgb;
  }
  return null; // of a page that leaves it to the browser
}

function contrast(element) {
  const ink = luminance(channels(getComputedStyle(element).color).rgb);
  const paper = luminance(background(element) ?? [255, 255, 255]);
  return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
}

function box(element) {
  const { x, y, width, height } = element.getBoundingClientRect();
  return { x: x + scrollX, y: y + scrollY, width, height };
}

function column(table, index) {
  return [...table.tBodies[0].rows].map((row) => row.cells[index].textContent);
}

// The texts of a column before, and after each of three clicks on its heading.
function clicked(table, index) {
  const head = table.tHead.rows[0].cells[index];
  const states = [[null, column(table, index)]];
  for (let click = 0; click < 3; click++) {
    head.querySelector("button").click();
    states.push([head.getAttribute("aria-sort"), column(table, index)]);
  }
  return states;
}

addEventListener("load", () => {
  const texts = [...document.body.querySelectorAll("*")].filter((one) =>
    !one.closest("svg, script") && [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));
  const table = document.querySelector("table");
  const scroll = table.closest(".scroll");
  const found = {
    width: innerWidth,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    scrolls: scroll.scrollWidth > scroll.clientWidth,
    contrasts: texts.map((one) => [one.tagName, contrast(one)]),
    resources: performance.getEntriesByType("resource").map((one) => one.name),
    images: document.images.length,
    headings: [...document.querySelectorAll("h1, h2, h3")].map((one) => one.tagName),
    cell: table.tBodies[0].rows[0].cells[0].textContent,
    figures: [...document.querySelectorAll("svg")].map((one) => ({
      ...box(one),
      name: document.getElementById(one.getAttribute("aria-labelledby")).textContent,
      marks: [...one.querySelectorAll("use")].filter((mark) => (({ width, height }) => width + height > 0)(mark.getBoundingClientRect())).length,
      text: Math.min(...[...one.querySelectorAll("text")].map((text) => text.getBoundingClientRect().height)),
    })),
    sorted: [0, 1].map((index) => clicked(table, index)),
    alignment: [0, 1].map((index) => getComputedStyle(table.tBodies[0].rows[0].cells[index]).textAlign),
  };
  scroll.style.maxHeight = "400px"; // as on a lower screen
  scroll.scrollTo(0, 200);
  found.head = table.tHead.rows[0].cells[1].getBoundingClientRect().top - scroll.getBoundingClientRect().top;
  found.scrolled = scroll.scrollTop;
  scroll.style.maxHeight = "";
  parent.postMessage(JSON.stringify({ ...found, errors }), "*");
});
