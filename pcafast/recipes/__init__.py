"""The experiments of the predecessors, one file each, by the names under which `pcafast reproduce` runs them."""

from pcafast.recipes import pca_cifar_resnet56, pca_imagenet_resnet18, pca_mnist
from pcafast.recipes.recipe import Recipe, Results, Table

__all__ = ["RECIPES", "Recipe", "Results", "Table"]

RECIPES: dict[str, Recipe] = {
    "pca-mnist": pca_mnist,
    "pca-cifar-resnet56": pca_cifar_resnet56,
    "pca-imagenet-resnet18": pca_imagenet_resnet18,
}
