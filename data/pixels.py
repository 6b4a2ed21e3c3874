"""The mean and the standard deviation of ImageNet's pixels, in [0, 1], as the encoders normalise them."""

PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)
