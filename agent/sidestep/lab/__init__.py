"""A cluster on one machine: nodes and pods are network namespaces, everything else is what a real cluster runs."""
