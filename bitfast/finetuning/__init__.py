"""``bitfast finetune``: transfer a checkpoint to images of one's own, by the recipe of the BiT paper."""
