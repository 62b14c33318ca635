"""Runs a file of `convnext-mm export --to onnx` on pictures, without PyTorch.

    pip install onnxruntime opencv-python-headless
    python run_onnx.py outputs/demo-fp32.onnx photo.jpg --out found

Copy it and change it: whatever it needs to know lies in the file's metadata.
"""

import argparse
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import onnxruntime


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('model', help='.onnx')
    parser.add_argument('pictures', nargs='+')
    parser.add_argument('--out', default='found', help='folder for pictures')
    parser.add_argument('--score', type=float, default=0.3)
    args = parser.parse_args()
    if not Path(args.model).is_file():
        parser.error(f'there is no file {args.model}')
    session = onnxruntime.InferenceSession(args.model)
    facts = facts_of(session)
    if 'task' not in facts:
        print(f'{args.model} is a backbone: it gives maps, not results')
        return 1
    Path(args.out).mkdir(parents=True, exist_ok=True)
    failed, written = 0, set()
    for picture in args.pictures:
        image = cv2.imread(picture)
        if image is None:
            print(f'{picture}: not a picture that OpenCV can read', file=sys.stderr)
            failed = 1
            continue
        if facts['task'] == 'detection':
            objects = detect(session, facts, image, args.score)
            drawn = draw_objects(image, objects, facts)
            names = [f'{name} {score:.2f}' for name, score, _, _ in objects]
            print(f'{picture}: {", ".join(names) or "nothing"}')
        else:
            classes = segment(session, facts, image)
            drawn = draw_classes(image, classes, facts)
            found = zip(*np.unique(classes, return_counts=True))
            there = [f'{facts["classes"][i]} {n / classes.size:.1%}' for i, n in found]
            print(f'{picture}: {", ".join(there)}')
        name = Path(picture).stem
        if name in written:  # of another folder
            name += f'-{len(written)}'
        written.add(name)
        file = str(Path(args.out, f'{name}.png'))
        if not cv2.imwrite(file, drawn):
            print(f'{file} cannot be written', file=sys.stderr)
            failed = 1
    return failed


def facts_of(session: onnxruntime.InferenceSession) -> dict:
    """Classes, colours and sizes, which the exporter wrote into the file."""
    return json.loads(session.get_modelmeta().custom_metadata_map['convnext_mm'])


def resized(image: np.ndarray, session, facts: dict) -> np.ndarray:
    """A picture at the size that the model was tested with, or that the file takes."""
    height, width = session.get_inputs()[0].shape[2:]
    if isinstance(height, int):
        return cv2.resize(image, (width, height))
    if 'scale' not in facts:
        return image
    long, short = max(facts['scale']), min(facts['scale'])
    if not facts['keep_ratio']:
        return cv2.resize(image, tuple(facts['scale']))
    factor = min(long / max(image.shape[:2]), short / min(image.shape[:2]))
    size = [max(1, int(side * factor + 0.5)) for side in image.shape[1::-1]]
    return cv2.resize(image, size)


def as_input(image: np.ndarray) -> np.ndarray:
    """(1, 3, H, W) in fp32, red first."""
    return image[None, :, :, ::-1].transpose(0, 3, 1, 2).astype(np.float32)


def detect(session, facts: dict, image: np.ndarray, least: float) -> list[tuple]:
    """Name, score, box x1, y1, x2, y2 and mask (H, W), or None, of each object."""
    small = resized(image, session, facts)
    boxes, scores, labels, *masks = session.run(None, {'images': as_input(small)})
    # Objects come by score; behind the last one it is 0.
    count = int((scores >= max(least, 1e-6)).sum())
    boxes *= np.tile(np.divide(image.shape[1::-1], small.shape[1::-1]), 2)
    found = []
    for index in range(count):
        mask = None
        if masks:
            mask = pasted(masks[0][index], boxes[index], image.shape[:2])
            mask = mask >= facts['mask_threshold']
        name = facts['classes'][labels[index]]
        found.append((name, float(scores[index]), boxes[index], mask))
    return found


def pasted(mask: np.ndarray, box: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A grid of probabilities over a box, as a map (H, W) of the picture."""
    x1, y1, x2, y2 = box
    height, width = mask.shape
    scale_x, scale_y = width / max(x2 - x1, 1e-6), height / max(y2 - y1, 1e-6)
    # Pixel centres of the picture, in pixels of the grid.
    x = (np.arange(shape[1], dtype=np.float32) + 0.5 - x1) * scale_x - 0.5
    y = (np.arange(shape[0], dtype=np.float32) + 0.5 - y1) * scale_y - 0.5
    x, y = (values.astype(np.float32) for values in np.meshgrid(x, y))
    return cv2.remap(
        mask.astype(np.float32), x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT
    )


def segment(session, facts: dict, image: np.ndarray) -> np.ndarray:
    """(H, W) index of the class of each pixel."""
    small = resized(image, session, facts)
    is_fixed = isinstance(session.get_inputs()[0].shape[2], int)
    if is_fixed or 'crop_size' not in facts:
        (logits,) = session.run(['logits'], {'images': as_input(small)})
    else:
        logits = by_windows(session, facts, small)
    # Logits first, classes after: a class map must not be interpolated.
    logits = cv2.resize(logits[0].transpose(1, 2, 0), image.shape[1::-1])
    return logits.reshape(*image.shape[:2], -1).argmax(2)


def by_windows(session, facts: dict, image: np.ndarray) -> np.ndarray:
    """Logits as a test over windows that overlap gives them: their mean."""
    (crop_h, crop_w), (stride_h, stride_w) = facts['crop_size'], facts['stride']
    height, width = image.shape[:2]
    total, count = 0, np.zeros((1, 1, height, width), np.float32)
    for y in range(max(height - crop_h + stride_h - 1, 0) // stride_h + 1):
        for x in range(max(width - crop_w + stride_w - 1, 0) // stride_w + 1):
            bottom = min(y * stride_h + crop_h, height)
            right = min(x * stride_w + crop_w, width)
            top, left = max(bottom - crop_h, 0), max(right - crop_w, 0)
            window = as_input(image[top:bottom, left:right])
            (logits,) = session.run(['logits'], {'images': window})
            if np.isscalar(total):
                total = np.zeros((1, logits.shape[1], height, width), np.float32)
            total[:, :, top:bottom, left:right] += logits
            count[:, :, top:bottom, left:right] += 1
    return total / count


def draw_objects(image: np.ndarray, objects: list[tuple], facts: dict) -> np.ndarray:
    drawn = image.copy()
    for name, score, box, mask in reversed(objects):
        colour = colour_of(facts, facts['classes'].index(name))
        if mask is not None:
            drawn[mask] = 0.5 * drawn[mask] + 0.5 * np.array(colour)
        x1, y1, x2, y2 = (round(float(value)) for value in box)
        cv2.rectangle(drawn, (x1, y1), (x2, y2), colour, 2)
        text = f'{name} {score:.2f}'
        cv2.putText(drawn, text, (x1, max(y1 - 4, 12)), 0, 0.5, colour, 1, cv2.LINE_AA)
    return drawn


def draw_classes(image: np.ndarray, classes: np.ndarray, facts: dict) -> np.ndarray:
    palette = [colour_of(facts, index) for index in range(len(facts['classes']))]
    colours = np.array(palette, np.float32)[classes]
    return (0.5 * image + 0.5 * colours).astype(np.uint8)


def colour_of(facts: dict, index: int) -> tuple[int, int, int]:
    red, green, blue = facts['palette'][index]
    return blue, green, red


if __name__ == '__main__':
    sys.exit(main())
