"""Named data sets: found, checked and stored once (`prepare`), then read as tensors (`read`)."""
