const label = document.getElementById("live");
async function look() {
  try {
    const answer = await fetch(location.pathname + "?version", { cache: "no-store" });
    if (!answer.ok) throw new Error(answer.status);
    if (label) label.textContent = "live";
    if ((await answer.text()) !== document.body.dataset.version) location.reload();
  } catch {
    if (label) label.textContent = "no longer served; the last report is report.html in the run's folder";
  }
}
setInterval(look, 4000);
