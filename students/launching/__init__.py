"""Start of a training on the nodes of a cluster.

launch       Ray Train: workers and restarts
failures     which failures end a training
network      network interfaces and meeting place of the workers
preemption   notice that a node is about to go away
notices      lines of the workers and of the controller for the driver's log
build_locks  locks and copies of DeepSpeed's compiled ops
"""
