"""Image sets as plain tensors: MNIST, Fashion-MNIST, CIFAR-10 from their files, digits from scikit-learn."""

from metatele.data.sets import DATASETS, ImageSet, load_images

__all__ = ["DATASETS", "ImageSet", "load_images"]
