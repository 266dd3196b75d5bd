"""Attribution methods: what a network looks at, as heat-maps."""
