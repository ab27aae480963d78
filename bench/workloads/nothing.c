/* The dynamic program of the `exec` workload: loads the C library, does nothing. */
int main(void)
{
    return 42;
}
