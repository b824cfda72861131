"""The page that ``html`` fills in: its skeleton and style; no address outside the page."""

PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@HEADING@</title>
<style>
:root { --ink: #1d2733; --dim: #66717f; --line: #dfe4ea; --paper: #fff; --ground: #f4f6f8; }
* { box-sizing: border-box; }
body { margin: 0; font: 14px/1.45 system-ui, "Segoe UI", Helvetica, Arial, sans-serif;
  color: var(--ink); background: var(--ground); }
header { padding: 18px 24px 10px; display: flex; flex-wrap: wrap; gap: 8px 24px;
  align-items: baseline; }
h1 { font-size: 20px; margin: 0; font-weight: 650; }
h2 { font-size: 16px; margin: 0; font-weight: 650; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 14px; padding: 0 24px 12px;
  color: var(--dim); font-size: 12.5px; align-items: center; }
.legend i { display: inline-block; width: 14px; height: 11px; border-radius: 3px;
  margin-right: 5px; vertical-align: -1px; }
.legend i.arrow { height: 0; border-top: 2.5px solid; border-radius: 0; vertical-align: 4px; }
button { font: inherit; font-size: 12.5px; border: 1px solid var(--line); background: var(--paper);
  border-radius: 6px; padding: 3px 10px; cursor: pointer; color: var(--ink); }
button:hover { background: #eef2f6; }
main { display: grid; gap: 16px; padding: 0 24px 24px; grid-template-columns: 1fr; }
main.side { grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  padding: 14px 16px 10px; min-width: 0; }
.facts { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 4px 0 10px; }
.facts b { font-weight: 600; }
.facts span { color: var(--dim); }
canvas { display: block; width: 100%; cursor: crosshair; touch-action: none; }
#tip { position: fixed; pointer-events: none; background: #17202bf2; color: #fff; padding: 8px 11px;
  border-radius: 7px; font-size: 12.5px; white-space: pre; max-width: 420px; display: none;
  box-shadow: 0 4px 14px #0004; z-index: 9; }
#tip b { font-size: 13.5px; }
@media (max-width: 900px) { main.side { grid-template-columns: 1fr; } }
</style>
</head>
<body>
<header><h1>@HEADING@</h1>
<span><button id="layout"></button> <button id="all">show all</button></span></header>
<div class="legend" id="legend"></div>
<main id="main"></main>
<div id="tip"></div>
<script id="data" type="application/json">@DATA@</script>
<script>
@SCRIPT@</script>
</body>
</html>
"""
