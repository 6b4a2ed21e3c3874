{# Under the pointer, the legend shows the values at its place instead of the last ones, and the axis says where that
is. The first x of a series that is not left of the pointer is found by bisection. `plot` is in the SVG's own pixels. #}
const LEFT = {{ plot.left }}, SPAN = {{ plot.width }}, TOP = {{ plot.top }}, HEIGHT = {{ plot.height }};
const short = v => {
  const size = Math.abs(v), units = [[1e9, "G"], [1e6, "M"], [1e3, "k"]];
  const [factor, unit] = size >= 1e4 ? units.find(([from]) => size >= from) : [1, ""];
  return size && size < 1e-3 ? v.toExponential(2) : +(v / factor).toPrecision(4) + unit;
};
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
      cursor.setAttribute("d", `M${LEFT + share * SPAN} ${TOP}v${HEIGHT}`);
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
