"""Speed and memory of jacnorm beside other libraries, on the same models and inputs in one run."""
