"""The embedded data set: generated images in which only the object decides the class."""
