"""One description of every op (`cases`), the error bound (`compare`), what every op must hold (`checks`), and Triton's
compiler without a device (`ahead_of_time`)."""
