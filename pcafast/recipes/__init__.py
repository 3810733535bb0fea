"""The experiments of the predecessors, one file each, by the names under which `pcafast reproduce` runs them."""

from pcafast.recipes import pca_mnist
from pcafast.recipes.recipe import Recipe, Results, Table

__all__ = ["RECIPES", "Recipe", "Results", "Table"]

RECIPES: dict[str, Recipe] = {"pca-mnist": pca_mnist}
