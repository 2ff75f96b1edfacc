"""What has nothing to do with tables: files, locks, the C library's allocator."""
