"""The settings of the study that `study.py` measures."""

TRAIN_PER_CLASS, VAL_PER_CLASS = 40, 30
EPOCHS = 6
FIRST_RATE, *OTHER_RATES = (0.006, 0.012, 0.024)
