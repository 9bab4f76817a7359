"""The command line, the stages as Ray jobs, and the cluster that they run on."""
