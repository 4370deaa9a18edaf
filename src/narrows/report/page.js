(() => {
  const all = (selector, node = document) => [...node.querySelectorAll(selector)];
  const panels = all("main > section"), tabs = all("nav a");
  const show = (hash) => {
    const chosen = panels.find((p) => "#" + p.id === hash) || panels[0];
    panels.forEach((p) => { p.hidden = p !== chosen; });
    tabs.forEach((t) => t.setAttribute("aria-current", t.hash === "#" + chosen.id));
  };
  if (panels.length > 1) {
    addEventListener("hashchange", () => show(location.hash));
    show(location.hash);
  }

  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  document.body.append(tip);
  const follow = (event) => {
    const over = event.target.closest("[data-tip]");
    tip.hidden = !over;
    if (!over) return;
    tip.textContent = over.dataset.tip;
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 8)) + "px";
    tip.style.top = Math.max(4, event.clientY + 18 + height > innerHeight ? event.clientY - height - 12 : event.clientY + 18) + "px";
  };
  addEventListener("pointermove", follow);
  addEventListener("pointerdown", follow);

  all("table.sort").forEach((table) => all("th", table).forEach((head, column) => {
    const sort = () => {
      const up = head.getAttribute("aria-sort") === "descending";
      const key = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent;
      const body = table.tBodies[0];
      const order = (a, b) => { const x = key(a), y = key(b), n = x - y; return (isNaN(n) ? x.localeCompare(y) : n) * (up ? 1 : -1); };
      body.append(...[...body.rows].sort(order));
      all("th", table).forEach((h) => h.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
    };
    head.tabIndex = 0;
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
  }));
})();
