"""The model card of the digits model, with the accuracy that was measured and how sure it is."""

from __future__ import annotations

import platform

import torch

import bitfast
from bitfast.measurement import Measurement

CARD_NAME = "README.md"

TEMPLATE = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-classification
tags:
- bit
- image-classification
- bitfast
metrics:
- accuracy
model-index:
- name: bitfast-digits
  results:
  - task:
      type: image-classification
    dataset:
      name: Optical Recognition of Handwritten Digits (scikit-learn's copy), held-out images
      type: scikit-learn/digits
    metrics:
    - type: accuracy
      value: {accuracy:.4f}
---

# bitfast-digits

A small Big Transfer (BiT) network of {parameters:,} parameters that reads handwritten digits. It is the
model that ships with bitfast, for demonstrations and tests. It loads in bitfast and in transformers 4.56:

```python
from bitfast import BitForImageClassification, BitImageProcessor
from bitfast.digits import MODEL_PATH, held_out_images

processor = BitImageProcessor.from_pretrained(MODEL_PATH)
model = BitForImageClassification.from_pretrained(MODEL_PATH)
image, digit = held_out_images()[0]
logits = model(**processor(image, return_tensors="pt")).logits
```

An image is 8x8 pixels, bright strokes on black. The processor makes 32x32 of it (bilinear) and normalizes.

## Accuracy

**{accuracy:.2%}** on the held-out images: {correct} correct out of {total}
(95% confidence interval {low:.2%} to {high:.2%}, Wilson's score interval).

## Data

E. Alpaydin and C. Kaynak (1998), *Optical Recognition of Handwritten Digits*, UCI Machine Learning
Repository, https://doi.org/10.24432/C50P49, licensed under
[CC BY 4.0](https://creativecommons.org/licenses/by/4.0/). Used is scikit-learn's copy
(`sklearn.datasets.load_digits`) of its test set: 1,797 images by 13 writers.

Changes to the data: the values v from 0 to 16 became pixels `(255 * v + 8) // 16` from 0 to 255. The
held-out images are in `held_out.png`, row by row, with their labels in `held_out.json`; they stay under
CC BY 4.0.

## Training

- Split: {training} training images and {total} held-out ones, a quarter of each digit's, drawn with a
  seed of its own that never changes. The held-out images had no part in training or in any choice.
- Settings were chosen on validation images cut from the training images (`--validate`); the final model
  then learned from all training images. The weights are those after the last epoch; none were picked.
- Preprocessing is that of `preprocessor_config.json`, in training as in use. Augmentation: small random
  rotations, zooms and shifts.
- Seed: {seed}. Epochs: {epochs}. Type: float32.
- Command: `python -m bitfast.digits.train --seed {seed} --epochs {epochs}`
- Machine: {machine}, one thread; torch {torch_version}; bitfast {bitfast_version}. Run again with
  the same of these (and the same backends of bitfast), it gives the same bits.

## Limits

- It knows only centered 8x8 digits, bright on black, made the way the data set was made. It sees one of
  the ten digits in any image whatsoever, and its probabilities are not calibrated.
- Training and held-out images come from the same 13 people, so expect less for the handwriting of others.
"""


def model_card(
    measurement: Measurement, *, training: int, seed: int, epochs: int, parameters: int
) -> str:
    """Return the text of the model card.

    Args:
        measurement: On the held-out images.
        training: Number of training images.
        seed: Of the training.
        epochs: Of the training.
        parameters: Number of the model's parameters.
    """
    low, high = measurement.confidence_interval()
    capability = torch.backends.cpu.get_cpu_capability()
    return TEMPLATE.format(
        accuracy=measurement.accuracy,
        correct=measurement.correct,
        total=measurement.total,
        low=low,
        high=high,
        training=training,
        seed=seed,
        epochs=epochs,
        parameters=parameters,
        machine=f"{platform.system()} {platform.machine()} CPU, {capability}",
        torch_version=torch.__version__,
        bitfast_version=bitfast.__version__,
    )
