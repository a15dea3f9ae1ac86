// Masks of class numbers, drawn over their image in colours. Class 0, most often the background,
// is left uncoloured.

const LARGEST_PX = 640; // of a side, as it is drawn
const OPACITY = 0.5;
const COLOURS = [
  [31, 119, 180], [174, 199, 232], [255, 127, 14], [255, 187, 120], [44, 160, 44],
  [152, 223, 138], [214, 39, 40], [255, 152, 150], [148, 103, 189], [197, 176, 213],
  [140, 86, 75], [196, 156, 148], [227, 119, 194], [247, 182, 210], [127, 127, 127],
  [199, 199, 199], [188, 189, 34], [219, 219, 141], [23, 190, 207], [158, 218, 229],
]; // those of the overlays that `taskpack predict --out` writes

export const colourOf = (number) => (number === 0 ? null : COLOURS[number % COLOURS.length]);

// A canvas with the picture, where the browser can show it, under the colours of a mask, which is a
// PNG as base64.
export async function drawMask(mask, picture) {
  const numbers = new Image();
  numbers.src = `data:image/png;base64,${mask}`;
  await numbers.decode();
  const sides = [numbers.naturalWidth, numbers.naturalHeight];
  const scale = Math.min(1, LARGEST_PX / Math.max(...sides));
  const [width, height] = sides.map((side) => Math.max(1, Math.round(scale * side)));
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingEnabled = false; // a mean of two classes is a third
  context.drawImage(numbers, 0, 0, width, height);
  const classes = context.getImageData(0, 0, width, height).data;
  context.imageSmoothingEnabled = true;
  context.clearRect(0, 0, width, height);
  if (picture.naturalWidth) context.drawImage(picture, 0, 0, width, height);
  const shown = context.getImageData(0, 0, width, height);
  for (let place = 0; place < classes.length; place += 4) {
    const colour = colourOf(classes[place]);
    if (colour === null) continue;
    for (const [channel, value] of colour.entries()) {
      const before = shown.data[place + channel];
      shown.data[place + channel] = (1 - OPACITY) * before + OPACITY * value;
    }
    shown.data[place + 3] = 255;
  }
  context.putImageData(shown, 0, 0);
  return canvas;
}
