"""taskpack: one frozen vision backbone, hundreds of tasks, a few kilobytes each."""
