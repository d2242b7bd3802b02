// What the page does in the browser: pictures that are dropped, pasted or chosen, and two videos that play in step.
"use strict";

// -- a picture ---------------------------------------------------------------------------------------------------------
// `element` has one <input type="file">; `give` gets the name that the server keeps the picture under, or "".
function cogvidPicture(element, give) {
  const say = (line) => {
    const place = element.querySelector("[data-error]");
    place.textContent = line;
    place.hidden = !line;
  };
  const send = async (file) => {
    say("");
    try {
      const answer = await fetch("pictures", { method: "POST", body: file });
      const text = await answer.text();
      if (!answer.ok) return say(text);
      give(text);
    } catch (error) {
      say("image: got no answer, want the server to be there");
    }
  };
  const filesOf = (transfer) => [...(transfer ? transfer.files : [])];

  element.addEventListener("change", (event) => {
    if (event.target.type === "file" && event.target.files.length) send(event.target.files[0]);
  });
  element.addEventListener("click", (event) => {
    if (event.target.closest("[data-remove]")) give("");
  });
  for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
    element.addEventListener(name, (event) => {
      event.preventDefault();
      element.classList.toggle("over", name === "dragenter" || name === "dragover");
      if (name === "drop" && filesOf(event.dataTransfer).length) send(filesOf(event.dataTransfer)[0]);
    });
  }
  document.addEventListener("paste", (event) => {
    const pictures = filesOf(event.clipboardData).filter((file) => file.type.startsWith("image/"));
    if (pictures.length && element.isConnected) {
      event.preventDefault();
      send(pictures[0]);
    }
  });
}

// -- two videos in step ------------------------------------------------------------------------------------------------
// Media events do not bubble, so they are caught on their way down.
(() => {
  const apart = 0.04; // seconds, less than a frame at 24 frames a second
  const othersOf = (video) => {
    const group = video instanceof HTMLVideoElement && video.closest(".step");
    return group ? [...group.querySelectorAll("video")].filter((each) => each !== video) : [];
  };
  const follow = (video) => {
    for (const other of othersOf(video)) {
      if (Math.abs(other.currentTime - video.currentTime) > apart) other.currentTime = video.currentTime;
      other.playbackRate = video.playbackRate;
      if (video.paused && !other.paused) other.pause();
      if (!video.paused && other.paused) other.play().catch(() => {});
    }
  };
  let leader = null; // the one that was touched last
  const touched = (event) => {
    if (othersOf(event.target).length) leader = event.target;
  };
  for (const name of ["pointerdown", "keydown"]) document.addEventListener(name, touched, true);
  for (const name of ["play", "pause", "seeking", "seeked", "ratechange", "timeupdate"]) {
    document.addEventListener(
      name,
      (event) => {
        if (!othersOf(event.target).length) return;
        if (leader === null || !leader.isConnected) leader = event.target;
        // A seek or a press on the other one, by keyboard or by script, makes it the one that leads.
        const started = name === "play" && leader.paused;
        const stopped = name === "pause" && !leader.paused && !event.target.ended;
        const sought = name === "seeking" && Math.abs(event.target.currentTime - leader.currentTime) > apart;
        if (started || stopped || sought) leader = event.target;
        if (event.target === leader) follow(leader);
      },
      true,
    );
  }
})();

// -- those who want no motion --------------------------------------------------------------------------------------------
if (matchMedia("(prefers-reduced-motion: reduce)").matches) {
  document.addEventListener("play", (event) => {
    if (event.target.autoplay && event.target.currentTime === 0) {
      event.target.autoplay = false;
      event.target.pause();
    }
  }, true);
}
