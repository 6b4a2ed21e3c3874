"""What the report looks like, and how it answers the pointer."""

# Eight colours that stay apart for the colour-blind, for light and for dark pages.
LIGHT = ("#1f6fd6", "#c2570c", "#00805a", "#b4267f", "#6d4bd1", "#8a6d00", "#0b7f95", "#a3333d")
DARK = ("#6aa9ff", "#ff9d5c", "#3fce9b", "#ff86c8", "#b09bff", "#e0bf3f", "#4fd0e6", "#ff8f95")


def _palette(colours: tuple[str, ...]) -> str:
    return "".join(f".c{i} {{ --c: {colour} }} " for i, colour in enumerate(colours))


STYLE = (
    _palette(LIGHT)
    + f"@media (prefers-color-scheme: dark) {{ {_palette(DARK)} }}"
    + """
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin: 2rem 0 .6rem } h3 { font-size: 1rem; margin: 1rem 0 .4rem }
nav, nav a { color: var(--faint); font-size: .9rem } section { scroll-margin-top: 1rem }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)) }
.chart { margin: 0; padding: .7rem; background: var(--panel); border-radius: .5rem; min-width: 0 }
.chart figcaption { display: flex; justify-content: space-between; color: var(--ink); font-size: .9rem }
.legend { display: flex; flex-wrap: wrap; gap: 0 1rem; margin: .2rem 0; padding: 0; list-style: none; font-size: .78rem;
  color: var(--faint) }
.legend output { display: inline-block; min-width: 4em; color: var(--ink); font-variant-numeric: tabular-nums }
i.training, i.evaluation { display: inline-block; width: 1.1em; height: 0; margin-right: .35em; vertical-align: middle;
  border-top: 3px solid var(--c) }
i.evaluation { border-top-style: dotted }
svg { width: 100%; display: block; touch-action: pan-y } svg.log { display: none }
.chart:has(.log-switch:checked) svg { display: none } .chart:has(.log-switch:checked) svg.log { display: block }
svg text { fill: var(--faint); font: 11px system-ui, sans-serif }
svg .x { text-anchor: middle } svg .y { text-anchor: end }
svg path { fill: none } .grid { stroke: var(--line); stroke-width: .6 } .axis, .tick { stroke: var(--faint) }
.curve, .raw { stroke: var(--c); stroke-width: 1.6; stroke-linejoin: round; stroke-linecap: round }
.raw { opacity: .3; stroke-width: 1 } .evaluation .curve { stroke-dasharray: 1 4 } circle { fill: var(--c) }
.mark { stroke: var(--c); stroke-width: 1.2; stroke-dasharray: 5 3; opacity: .7 } .cursor { stroke: var(--faint) }
.scroll { overflow-x: auto; margin: .4rem 0 }
.scroll :first-child:is(td, th) { position: sticky; left: 0; background: var(--back) }
table { border-collapse: collapse; font-size: .85rem }
th, td { text-align: left; vertical-align: top; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: break-word; min-width: 5rem; max-width: 26rem } td.wide { min-width: 15rem }
th { color: var(--faint); font-weight: 600 } .run { white-space: nowrap }
.strip { display: flex; gap: .5rem; overflow-x: auto; padding: .3rem 0; border-bottom: 1px solid var(--line) }
.strip figure { margin: 0; flex: 0 0 6.5rem } .strip b { color: var(--ink); font-weight: 600; display: block }
summary { cursor: pointer; color: var(--faint) }
"""
)

# Under the pointer, the legend shows the values at its place instead of the last ones, and the axis says where that is.
# The first x of a series that is not left of the pointer is found by bisection. LEFT and SPAN are the plot's in the
# SVG's own pixels.
SCRIPT = """
const short = v => Math.abs(v) >= 1e4 || (v && Math.abs(v) < 1e-3) ? v.toExponential(2) : String(+v.toPrecision(4));
for (const chart of document.querySelectorAll(".chart")) {
  const { series } = JSON.parse(chart.querySelector("script").textContent);
  const outputs = [...chart.querySelectorAll("output")], last = outputs.map(o => o.textContent);
  const nearest = (points, x) => {
    let low = 0, high = points.length - 1;
    while (low < high) { const mid = (low + high) >> 1; if (points[mid][0] < x) low = mid + 1; else high = mid; }
    return low && x - points[low - 1][0] < points[low][0] - x ? points[low - 1] : points[low];
  };
  for (const svg of chart.querySelectorAll("svg")) {
    const [first, end] = svg.dataset.x.split(" ").map(Number), cursor = svg.querySelector(".cursor");
    const name = svg.querySelector(".name"), axis = name.textContent;
    svg.addEventListener("pointermove", event => {
      const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
      const share = Math.min(1, Math.max(0, ((event.clientX - box.left) * scale - LEFT) / SPAN));
      const x = first + share * (end - first);
      cursor.setAttribute("d", `M${LEFT + share * SPAN} TOPvHEIGHT`);
      series.forEach(({ points }, i) => {
        const value = nearest(points, x)[1];
        outputs[i].textContent = value === null ? "–" : short(value);
      });
      name.textContent = `${axis} ${Math.round(x)}`;
    });
    svg.addEventListener("pointerleave", () => {
      cursor.setAttribute("d", "");
      name.textContent = axis;
      outputs.forEach((output, i) => { output.textContent = last[i]; });
    });
  }
}
"""
