"""The control plane: Kubernetes objects to workloads and services over delta xDS, and a certificate authority."""
