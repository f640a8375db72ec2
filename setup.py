"""Maps the four root folders to one package; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

ROOTS = {"patchkit": "patchkit", "patchkit.recipes": "recipes", "patchkit.kernels": "kernels", "patchkit.cli": "cli"}
setup(
    package_dir=ROOTS,
    packages=[
        package
        for name, folder in ROOTS.items()
        for package in (name, *(f"{name}.{sub}" for sub in find_packages(folder)))
    ],
)
