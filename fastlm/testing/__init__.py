"""One description of every op (`cases`), comparison by a bound that can be defended (`compare`), timing (`timing`)."""
