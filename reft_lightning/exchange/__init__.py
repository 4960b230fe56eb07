"""Read and write adapters of other libraries (pyreft, AdapterHub, EasySteer, llama.cpp), or merge into weights."""
