"""Training data: where it is found, how it is read, what is cached; and Shapes, whose truth is known."""
