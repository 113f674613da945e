let seen = null;
const label = document.getElementById("live");
async function look() {
  try {
    const answer = await fetch(location.pathname + "?version", { cache: "no-store" });
    if (!answer.ok) throw new Error(answer.status);
    const version = await answer.text();
    if (label) label.textContent = "live";
    if (seen !== null && version !== seen) location.reload();
    seen = version;
  } catch {
    if (label) label.textContent = "no longer served; this is how it was";
  }
}
look();
setInterval(look, 3000);
