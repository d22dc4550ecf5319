"""Private: how `ShadowService`, the models and their guard work. Nothing here is called from outside the package."""
